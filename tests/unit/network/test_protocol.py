"""Messages as JSON and as protobuf."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_common.errors import InvalidArgumentError, PreconditionError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex, Sha256Hex
from cortex_common.job.parse import parse_job
from cortex_common.job.status import JobPhase, JobStatus
from cortex_common.network import messages as m
from cortex_common.network import work as w
from cortex_common.network.protocol import Envelope, TenzroProtocol, type_of
from cortex_common.network.wire import pull_from_proto, pull_request, report_request
from cortex_common.pb.v1 import aggregator_pb2, coordinator_pb2
from cortex_common.security.objects import WrappedKey
from cortex_common.telemetry.hardware import Gpu, Resources
from cortex_common.transfer.receipt import Receipt

SPEC = parse_job({"name": "x", "model": {"input_dim": 4, "output_dim": 2}, "data": {"train": "d"}})
HELLO = m.Hello("n1", "eu", "abc")
PLACE = w.Place("j/1.0/t/0", "j", 1, 0)
RECEIPT = Receipt(
    JobId("j"), RoundNumber(1), 0, SeatIndex(2), NodeName("n1"), Sha256Hex("ab" * 32), 3.5, 100, 1, newly_accepted=False
)
TRAINED = w.Trained(RECEIPT, 1.5, 0.25, 10, 2, {"train_loss": 0.5}, 7, 8)
ASSIGNMENT = w.Assignment(
    assignment_id="a",
    job_id=JobId("j"),
    transfer_id=JobId("j-t0"),
    round=RoundNumber(1),
    attempt=0,
    fence=1,
    seat=SeatIndex(0),
    seats=2,
    spec=SPEC,
    data_key=WrappedKey(KeyId("k"), 3, bytes(range(80))),
    aggregator=NodeName("aggregator-eu"),
    aggregator_address="127.0.0.1:50054",
    base_sha256="ab" * 32,
    chunk_elements=1024,
    work=w.Evaluate((1, 2), 4),
    base_seats=frozenset({SeatIndex(0), SeatIndex(1)}),
)
RESOURCES = Resources(2, 0.5, 3, 4, 5, 6, 7, gpus=(Gpu("H100", 1, 2, 0.5),), slots=1)
STATUS = JobStatus(
    job_id="j", name="x", status=JobPhase.TRAINING, round=1, rounds=2, submitted_at=datetime(2026, 1, 1, tzinfo=UTC)
)
SAMPLES: list[m.Message] = [
    m.Join(1, HELLO, "ab", "cd" * 32, "ef", "01" * 64),
    m.Heartbeat(RESOURCES, (m.DatasetFacts("d", (28, 28), 10, 60000),), "idle", "0.1.0", 1.5),
    m.TrainingMetrics(PLACE, "training", 0.5, {"loss": 1.0}),
    m.WorkResult(PLACE, TRAINED),
    m.WorkResult(PLACE, w.Evaluated((w.SliceScore(0, 10, 1.5, 9),))),
    m.WorkResult(PLACE, w.Failed("no", is_permanent=True)),
    m.WeightsUpdate(),
    m.ModelPull("j", "ab" * 32, "", 3, 2),
    m.Cancel(),
    m.JobStatusRequest("j"),
    m.Leave(),
    m.Challenge((1,), "cortex", "00ff"),
    m.Welcome(1, "cortex", "n1", 4, 1, 2, 600.0),
    m.Assignments((ASSIGNMENT,), (w.Unreadable(PLACE, "newer"),), is_first=True),
    m.HeartbeatAck(3.0),
    m.ReportAck(wanted=True),
    m.WeightsResume(2, already_accepted=True),
    m.WeightsAck(3),
    m.WeightsAccepted(RECEIPT),
    m.JobStatusMessage(STATUS),
    m.ErrorMessage("NOT_FOUND", "no", (m.Mistake("a.b", "c"),)),
]


def test_every_message_survives_the_way_as_json() -> None:
    assert {type(each) for each in SAMPLES} == set(TenzroProtocol.types().values())
    for number, message in enumerate(SAMPLES):
        envelope = Envelope(message, id=number, ref=None if number % 2 else 9)
        assert TenzroProtocol.decode(TenzroProtocol.encode(envelope)) == envelope


def test_names_are_those_of_the_contract() -> None:
    assert {"JOIN", "WEIGHTS_UPDATE", "TRAINING_METRICS", "JOB_STATUS"} <= set(TenzroProtocol.types())
    assert type_of(m.HeartbeatAck) == "HEARTBEAT_ACK"


@given(st.text() | st.recursive(st.none() | st.floats() | st.text(), lambda each: st.lists(each)).map(json.dumps))
def test_what_is_no_message_is_refused_in_words(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        TenzroProtocol.decode(text)


@given(st.sampled_from(SAMPLES), st.data())
def test_a_message_with_a_field_changed_is_read_or_refused_never_anything_else(m_: m.Message, data: Any) -> None:
    document = json.loads(TenzroProtocol.encode(Envelope(m_)))
    key = data.draw(st.sampled_from(sorted(document)))
    document[key] = data.draw(
        st.none() | st.integers() | st.text() | st.lists(st.none()) | st.dictionaries(st.text(), st.none())
    )
    with contextlib.suppress(InvalidArgumentError):
        assert TenzroProtocol.decode(json.dumps(document)).message is not None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"type":"LEAVE","x":1}', "x: 1 given"),
        ('{"type":"LEAVE","type":"LEAVE"}', "given twice"),
        ('{"type":"NOPE"}', "allowed: ASSIGNMENTS"),
        ('{"type":"LEAVE","id":-1}', "id: -1 given"),
        ('{"type":"REPORT_ACK","wanted":NaN}', "NaN given"),
        ("[" * 100_000, "nested too deeply"),
        ('{"type":"MODEL_PULL","job_id":"j","sha256":"x"}', "sha256: 'x' given"),
    ],
)
def test_mistakes_are_named(text: str, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        TenzroProtocol.decode(text)


def test_figures_that_are_not_finite_are_left_out() -> None:
    metrics = m.TrainingMetrics(PLACE, "training", 0.0, {"loss": float("nan"), "steps": 2.0})
    read = TenzroProtocol.decode(TenzroProtocol.encode(Envelope(metrics))).message
    assert isinstance(read, m.TrainingMetrics)
    assert read.metrics == {"steps": 2.0}


def test_versions_are_negotiated() -> None:
    assert TenzroProtocol.negotiate([7, 1]) == 1
    with pytest.raises(PreconditionError, match="known here: 1"):
        TenzroProtocol.negotiate([2])


def test_reports_say_the_same_as_protobuf() -> None:
    report = report_request(m.WorkResult(PLACE, TRAINED), HELLO)
    assert (report.worker, report.incarnation, report.assignment_id) == ("n1", "abc", PLACE.assignment_id)
    assert report.trained.receipt.content_sha256 == RECEIPT.content_sha256
    assert dict(report.trained.metrics) == {"train_loss": 0.5}
    request = TenzroProtocol.to_proto(m.WorkResult(PLACE, w.Failed("no", is_permanent=True)), HELLO)
    assert isinstance(request, coordinator_pb2.ReportRequest)
    assert request.failed.permanent


def test_a_download_is_asked_for_with_the_same_fields_over_both_transports() -> None:
    pull = m.ModelPull("j", "ab" * 32, "cd" * 32, 3, 2)
    assert pull_from_proto(pull_request(pull)) == pull
    fields = {each.name for each in dataclasses.fields(m.ModelPull)}
    assert fields == {each.name for each in aggregator_pb2.PullModelRequest.DESCRIPTOR.fields}


def test_assignments_that_are_not_understood_are_told_apart() -> None:
    response = coordinator_pb2.AttendResponse(assignments=[coordinator_pb2.Assignment(assignment_id="a", job_id="j")])
    read = TenzroProtocol.from_proto(response.SerializeToString())
    assert read.assignments == ()
    assert read.unreadable[0].place.assignment_id == "a"
    assert "impossible" in read.unreadable[0].reason


def test_every_type_has_a_schema() -> None:
    for name in TenzroProtocol.types():
        schema = TenzroProtocol.schema(name)
        assert schema["properties"]["type"] == {"const": name}
        assert schema["description"].startswith(name)


def test_a_failure_is_told_as_far_as_there_is_room_for_it():
    failed = w.Failed("x" * 5000, False)
    assert len(failed.reason) == 4096
    text = TenzroProtocol.encode(Envelope(m.WorkResult(w.Place("a1", "j1", 1, 0), failed), 1))
    assert TenzroProtocol.decode(text).message.outcome == failed
