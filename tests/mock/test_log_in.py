"""A broker that refuses the log-in: what is told and logged about it does not hold the password or the token."""

import logging
import time
from typing import Any

import pytest

import kbatch

from ..waiting import until
from .refusing_broker import RefusingBroker

SECRET = "hunter2-hunter2"


@pytest.mark.parametrize(
    ("mechanism", "config"),
    [
        ("PLAIN", {"sasl.username": "shop", "sasl.password": SECRET}),
        ("OAUTHBEARER", {"oauth_cb": lambda config: (SECRET, time.time() + 3_600, "shop", {"tenant": "shop"})}),
    ],
)
def test_a_refused_log_in_is_told_without_its_password(
    mechanism: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    errors: list[Any] = []
    caplog.set_level(logging.DEBUG)
    with RefusingBroker(mechanism) as broker:
        config = {"bootstrap.servers": broker.bootstrap_servers, "sasl.mechanism": mechanism, **config}
        config |= {"security.protocol": "sasl_plaintext", "debug": "all", "log_level": 7, "error_cb": errors.append}
        for logger in (None, logging.getLogger("tests.kbatch.log_in")):
            errors.clear()
            with kbatch.Producer({**config, "message.timeout.ms": 500, "logger": logger}) as producer:
                report = producer.send_batch("orders", [kbatch.Envelope(data=b"x")])
                until(lambda: any(error.name() == "_AUTHENTICATION" for error in errors), "the failure")
                shown = [str(report.errors[0]), repr(report), repr(producer), *(error.str() for error in errors)]
            assert any("who are you?" in text for text in shown)
            assert not any(SECRET in text for text in shown)
        assert any(SECRET.encode() in credentials for credentials in broker.credentials)  # it was sent
    lines, written = [record.getMessage() for record in caplog.records], capfd.readouterr().err
    assert any("who are you?" in line for line in lines)
    assert "SASL" in written
    assert not any(SECRET in line for line in [*lines, written])
