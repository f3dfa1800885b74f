"""DSSE envelopes and signed jobs: the published test vector, what is refused, what a signature holds."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.envelope import Envelope, Signature
from cortex_common.errors import AlreadyExistsError, CorruptError, InvalidArgumentError, PreconditionError
from cortex_common.job.parse import parse_job
from cortex_common.job.statement import JobStatement, load_submission, statement_of
from cortex_common.job.wire import spec_bytes, spec_from_proto, spec_to_proto
from cortex_common.security.signing import PublicKey, SigningKey, signers

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DOCUMENT = {
    "model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10},
    "data": {"train": "digits"},
    "aggregation": {"strategy": "fedavgm", "options": {"server_learning_rate": 1.0, "momentum": 0.9}},
}


def statement() -> JobStatement:
    return JobStatement.of(parse_job(DOCUMENT), "hospital-a", NOW, timedelta(days=1))


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey.create(tmp_path / "ann.key")


def test_signatures_are_made_over_what_the_specification_says():
    """The example of the DSSE protocol document."""
    envelope = Envelope("http://example.com/HelloWorld", b"hello world")
    assert envelope.signed_bytes == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


@given(st.text(), st.binary(), st.lists(st.builds(Signature, st.text(), st.binary()), max_size=3))
def test_an_envelope_is_read_as_it_was_written(kind: str, payload: bytes, signatures: list[Signature]):
    envelope = Envelope(kind, payload, tuple(signatures))
    assert Envelope.from_json(envelope.to_json()) == envelope


@given(st.text(), st.binary(), st.text(), st.binary())
def test_no_two_envelopes_are_signed_as_the_same_bytes(kind: str, payload: bytes, other_kind: str, other: bytes):
    same = (kind, payload) == (other_kind, other)
    assert (Envelope(kind, payload).signed_bytes == Envelope(other_kind, other).signed_bytes) == same


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "payloadType"),
        ('{"payloadType": "x", "payload": "aGk=", "signatures": [], "more": 1}', "allowed is a DSSE envelope"),
        ('{"payloadType": "x", "payload": "a b", "signatures": []}', "payload is not base64"),
        ('{"payloadType": "x", "payload": "aGk=", "signatures": [{"keyid": "k"}]}', "sig is missing"),
        ('{"payloadType": "x", "payload": "aGk=", "signatures": [1]}', "allowed are mappings"),
        (f'{{"payloadType": "x", "payload": "aGk=", "signatures": [{",".join(["{}"] * 33)}]}}', "33 signatures"),
        ("[" * 100_000, "not JSON"),
        (" " * (1 << 21), "allowed are 1048576"),
    ],
)
def test_what_is_no_envelope_is_refused_with_the_reason(text: str, told: str):
    with pytest.raises(InvalidArgumentError, match=told):
        Envelope.from_json(text)


def test_a_statement_holds_the_whole_job_with_its_defaults():
    signed = statement().to_envelope()
    assert json.loads(signed.payload)["job"]["training"]["rounds"] == 5
    assert statement_of(signed) == statement()
    assert statement().to_envelope() == signed


def test_a_signed_job_is_the_same_bytes_after_it_went_over_the_wire():
    job = statement_of(statement().to_envelope()).job
    travelled = spec_from_proto(spec_to_proto(job))
    assert spec_bytes(travelled) == spec_bytes(job)
    assert spec_bytes(job) != spec_bytes(parse_job(DOCUMENT | {"training": {"rounds": 6}}))


def test_mistakes_of_a_statement_are_told_together():
    document = json.loads(statement().to_envelope().payload)
    document["organisation"] = ""
    document["job"]["training"]["rounds"] = 0
    document["extra"] = 1
    envelope = replace(statement().to_envelope(), payload=json.dumps(document).encode())
    with pytest.raises(InvalidArgumentError) as refused:
        statement_of(envelope)
    assert {each.path for each in refused.value.violations} == {"organisation", "job.training.rounds", "extra"}


def test_a_statement_of_another_kind_is_refused():
    with pytest.raises(InvalidArgumentError, match="payloadType"):
        statement_of(replace(statement().to_envelope(), payload_type="application/json"))


def test_a_statement_that_never_held_is_refused():
    with pytest.raises(InvalidArgumentError, match="expires_at"):
        JobStatement.of(parse_job(DOCUMENT), "a", NOW, timedelta(0))


def test_a_signature_holds_for_type_and_payload_and_nothing_else(key: SigningKey, tmp_path: Path):
    signed = key.sign(statement().to_envelope())
    other = SigningKey.create(tmp_path / "bob.key")
    assert key.public.has_signed(signed)
    assert not other.public.has_signed(signed)
    assert not key.public.has_signed(replace(signed, payload=signed.payload + b" "))
    assert not key.public.has_signed(replace(signed, payload_type=signed.payload_type + "x"))
    flipped = bytes([signed.signatures[0].signature[0] ^ 1]) + signed.signatures[0].signature[1:]
    assert not key.public.has_signed(replace(signed, signatures=(Signature(key.public.key_id, flipped),)))
    # The key id is only a hint: naming another key does not make it hers.
    assert not other.public.has_signed(
        replace(signed, signatures=(replace(signed.signatures[0], key_id=other.public.key_id),))
    )


def test_several_people_sign_the_same_job_each_once(key: SigningKey, tmp_path: Path):
    other = SigningKey.create(tmp_path / "bob.key")
    signed = key.sign(other.sign(key.sign(statement().to_envelope())))
    assert len(signed.signatures) == 2
    assert signers(signed, [key.public, other.public]) == {key.public, other.public}


def test_a_key_is_its_owners_alone_and_never_overwritten(key: SigningKey, tmp_path: Path):
    path = tmp_path / "ann.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).public == key.public
    assert PublicKey.parse(str(key.public)) == key.public
    with pytest.raises(AlreadyExistsError):
        SigningKey.create(path)
    path.chmod(0o640)
    with pytest.raises(PreconditionError, match="mode 640"):
        SigningKey.load(path)


def test_other_files_are_no_keys(tmp_path: Path):
    path = tmp_path / "no.key"
    path.write_text("nothing")
    path.chmod(0o600)
    with pytest.raises(CorruptError, match="no Ed25519"):
        SigningKey.load(path)
    with pytest.raises(InvalidArgumentError, match="ed25519:"):
        PublicKey.parse("ed25519:aGk=")


def test_a_file_is_a_job_or_a_signed_one(key: SigningKey, tmp_path: Path):
    path = tmp_path / "job"
    path.write_text(json.dumps(DOCUMENT))
    assert load_submission(path) == parse_job(DOCUMENT)
    signed = key.sign(statement().to_envelope())
    path.write_text(signed.to_json())
    assert load_submission(path) == signed
    path.write_text(replace(signed, payload=b"{}").to_json())
    with pytest.raises(InvalidArgumentError, match="organisation"):
        load_submission(path)
