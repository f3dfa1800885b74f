"""docs/websocket.md says what the code does."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from cortex_common.network import messages as m
from cortex_common.network.close_codes import Close
from cortex_common.network.protocol import Envelope, TenzroProtocol
from cortex_common.network.reference import with_section
from tests.architecture.sources import ROOT

DOCUMENT = (ROOT / "docs" / "websocket.md").read_text()


def test_its_schemas_are_those_of_the_code() -> None:
    assert with_section(DOCUMENT) == DOCUMENT, "run `python -m cortex_common.network.reference docs/websocket.md`"


def test_it_has_every_close_code() -> None:
    table = DOCUMENT.partition("| close code |")[2].partition("\n\n")[0]
    told = {int(code) for code in re.findall(r"\b(\d{4})\b", table)}
    assert {code.value for code in Close} <= told


def test_its_schemas_take_what_the_code_writes() -> None:
    message = m.Welcome(1, "cortex", "n1", 4, 1 << 22, 1 << 20, 300.0)
    document = json.loads(TenzroProtocol.encode(Envelope(message, ref=1)))
    schema = TenzroProtocol.schema("WELCOME")
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"more": 1}, schema)
