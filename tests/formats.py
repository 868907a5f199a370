"""The compliance suite in other wire formats than kbatch's own."""

from typing import Any

import pytest

from kbatch import SenderMode


class InOtherFormats:
    """Before a subclass of `TransportCompliance`: of its tests those that do not run for each format anyway.

    With one kind of sender: what the formats write does not depend on who sends it.
    """

    test_send_from_one_node_to_another_by_destination: Any = None
    test_every_field_arrives: Any = None
    test_will_move_to_dead_letter_queue_without_any_exception_match: Any = None

    @pytest.fixture(params=[SenderMode.BUFFERED], ids=lambda mode: mode.name)
    def mode(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(params=["threads"])
    def style(self, request: pytest.FixtureRequest) -> Any:
        return request.param

    @pytest.fixture(params=["wolverine", "cloudevents"])
    def wire(self, request: pytest.FixtureRequest) -> Any:
        return request.param
