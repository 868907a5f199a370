"""Maps batches and compares with the reference, on producers that have mapped others before."""

from typing import Any

from kbatch import _fastmap
from tests import mapping
from tests.reference import Setting, Spec, refused_arguments


class Replay:
    def __init__(self) -> None:
        self._producers: dict[int, Any] = {}

    def batch(self, setting: Setting, specs: list[Spec]) -> Any:
        """The answer of both: records, the refused envelope, or what the constructor refused."""
        for index, spec in enumerate(specs):
            refused = refused_arguments(spec.arguments)
            if spec.tombstone:
                refused -= {"message", "data"}
            refusal = self._refusal(spec)
            if refusal is not None:
                assert refused, f"the constructor refuses envelope {index}: {refusal}"
                return "refused by the constructor"
            assert not refused, f"the constructor takes envelope {index} with {refused}"
        producer = self._producers.get(id(setting))
        if producer is None:
            producer = self._producers[id(setting)] = mapping.producer_of(setting)
        try:
            answer = mapping.assert_agree(producer, "orders", specs, setting)
        except (AssertionError, MemoryError):
            raise
        except Exception as error:
            raise AssertionError(f"not an answer: {error!r}") from error
        assert _fastmap.pinned_buffers() == 0
        assert isinstance(answer, (list, mapping.Failed))
        return answer

    def _refusal(self, spec: Spec) -> bytes | None:
        try:
            mapping.envelope_of(spec)
        except (TypeError, ValueError) as error:
            return str(error).encode()  # it can be logged
        return None
