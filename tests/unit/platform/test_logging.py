"""Logs: one JSON object a line, no secrets."""

from __future__ import annotations

import json
import logging

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.logging import configure_logging, get_logger

pytestmark = pytest.mark.usefixtures("logging_as_before")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_line_is_one_event_with_its_facts(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("coordinator", "INFO")
    get_logger("rounds").info("round_closed", round=7, reason="all reported")
    get_logger("rounds").debug("not_shown")
    (line,) = lines(capsys)
    assert line.pop("timestamp")
    assert line == {
        "event": "round_closed", "round": 7, "reason": "all reported",
        "level": "info", "logger": "rounds", "service": "coordinator",
    }  # fmt: skip


def test_secrets_are_hidden_however_deep(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", "INFO")
    canary = "c4n4ry"
    get_logger("x").info(
        "e",
        key=canary,
        data_key=canary,
        api_token=canary,
        headers=[{"Authorization": canary}],
        key_id="k1",
        blob=b"123",
    )
    text = capsys.readouterr().err
    assert canary not in text
    line = json.loads(text)
    assert line["key_id"] == "k1"
    assert line["blob"] == "3 bytes"


def test_a_traceback_shows_no_local_variables(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        configure_logging("worker", "INFO", json=as_json)
        held = "".join(["hidden", "in", "a", "local"])
        try:
            raise ValueError("boom")
        except ValueError:
            get_logger("x").exception("failed")
        text = capsys.readouterr().err
        assert "boom" in text
        assert held not in text


def test_libraries_log_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("gateway", "WARNING")
    logging.getLogger("somewhere").warning("hello %s", "you")
    (line,) = lines(capsys)
    assert (line["event"], line["service"], line["level"]) == ("hello you", "gateway", "warning")


def test_a_program_that_configured_nothing_gets_nothing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("sdk").info("connected")
    get_logger("sdk").warning("slow")
    assert capsys.readouterr().out == ""


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'LOUD': allowed are DEBUG"):
        configure_logging("x", "LOUD")
