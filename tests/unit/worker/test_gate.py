"""The worker asks its site's policy before anything of a job runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from cortex_common.data.catalogue import DatasetInfo
from cortex_common.data.loading import Dataset
from cortex_common.data.normalise import BYTES
from cortex_common.errors import CorruptError, InvalidArgumentError, NotFoundError
from cortex_common.ids import JobId, KeyId, NodeName, RoundNumber, SeatIndex
from cortex_common.job.parse import parse_job
from cortex_common.job.site_policy import update_bytes
from cortex_common.job.spec import JobSpec
from cortex_common.job.statement import JobStatement
from cortex_common.network.work import Assignment, Evaluate, SealedPart, Train
from cortex_common.security.objects import DataKey
from cortex_common.security.shards import seal_dataset
from cortex_common.security.signing import SigningKey
from services.worker.gate import Gate
from services.worker.outgoing import Outgoing
from tests.fakes import ManualClock

JOB = JobId("job-1")


def job(**sections: object) -> JobSpec:
    base = {"model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10}, "data": {"train": "digits"}}
    return parse_job(base | sections)


def assignment(spec: JobSpec, signed_job: str = "", name: str = "a1") -> Assignment:
    return Assignment(
        assignment_id=name,
        job_id=JOB,
        transfer_id=JOB,
        round=RoundNumber(1),
        attempt=1,
        fence=1,
        seat=SeatIndex(0),
        seats=4,
        spec=spec,
        data_key=DataKey(KeyId("k"), 1, bytes(32)),
        aggregator=NodeName("agg"),
        aggregator_address="127.0.0.1:1",
        base_sha256="b" * 64,
        chunk_elements=1024,
        work=Train(),
        signed_job=signed_job,
    )


class Site:
    """A policy file, and the gate that reads it."""

    def __init__(self, folder: Path, clock: ManualClock) -> None:
        self.file = folder / "site-policy.toml"
        self.clock = clock
        self.outgoing = Outgoing(folder / "state" / "outgoing.json")
        self.key = SigningKey.create(folder / "ann.key")

    def gate(self, text: str) -> Gate:
        self.file.write_text(text)
        return Gate(self.file, "cortex", self.outgoing, self.clock)

    @property
    def signers(self) -> str:
        return f'allowed_signers = [{{name = "ann", key = "{self.key.public}"}}]\n'

    def signed(self, spec: JobSpec, network: str | None = None) -> str:
        now = datetime.fromtimestamp(self.clock.wall_s(), UTC)
        statement = JobStatement.of(spec, "north", now, timedelta(hours=1), network)
        return self.key.sign(statement.to_envelope()).to_json()


@pytest.fixture
def site(tmp_path: Path, clock: ManualClock) -> Site:
    return Site(tmp_path, clock)


def rules(gate: Gate, given: Assignment) -> list[str]:
    return [each.rule for each in gate.refusals(given)]


def test_without_a_policy_every_job_may_run(site: Site):
    gate = Gate(None, "cortex", site.outgoing, site.clock)
    assert rules(gate, assignment(job())) == []
    assert rules(gate, assignment(job(), site.signed(job()))) == []


def test_a_job_must_be_signed_by_somebody_the_site_knows(site: Site, tmp_path: Path):
    gate = site.gate(site.signers)
    (tmp_path / "elsewhere").mkdir()
    stranger = Site(tmp_path / "elsewhere", site.clock)
    assert rules(gate, assignment(job())) == ["allowed_signers"]
    assert rules(gate, assignment(job(), stranger.signed(job()))) == ["allowed_signers"]
    assert rules(gate, assignment(job(), site.signed(job()))) == []


def test_what_runs_is_what_was_signed_or_nothing(site: Site):
    """Also on a site without a policy: a coordinator that changes a signed job is found out."""
    for gate in (site.gate(site.signers), Gate(None, "cortex", site.outgoing, site.clock)):
        changed = assignment(job(training={"rounds": 500}), site.signed(job()))
        (refusal,) = gate.refusals(changed)
        assert refusal.rule == "signed_job"
        assert "training.rounds is 500, signed 5" in refusal.message


def test_a_signature_ends_and_is_for_its_network(site: Site):
    gate = site.gate(site.signers)
    given = assignment(job(), site.signed(job()))
    foreign = assignment(job(), site.signed(job(), "other"))
    assert rules(gate, foreign) == ["signed_job"]
    assert rules(gate, assignment(job(), site.signed(job(), "cortex"))) == []
    site.clock.jump_wall(3601)
    (refusal,) = gate.refusals(given)
    assert "expired" in refusal.message


@pytest.mark.parametrize("signed_job", ["{", '{"payloadType":"x","payload":"","signatures":[]}'])
def test_what_is_no_signed_job_is_refused(site: Site, signed_job: str):
    assert rules(site.gate(site.signers), assignment(job(), signed_job)) == ["signed_job"]


def test_sealed_data_are_of_somebody_the_site_knows(site: Site, tmp_path: Path):
    dataset = Dataset(DatasetInfo("any", (2,), 2, 4), np.zeros((4, 2), np.uint8), np.arange(4) % 2, BYTES)
    told, _ = seal_dataset("ward", dataset, [np.arange(4)], site.key, tmp_path / "ward", datetime.now(UTC))
    part = SealedPart(told.envelope.to_json(), (0,), ())
    given = replace(assignment(job(data={"train": told.reference})), sealed=part)
    for name, key, broken in (("ann", site.key.public, []), ("bob", "ed25519:" + "A" * 43 + "=", ["data_signers"])):
        gate = site.gate(f'data_signers = [{{name = "{name}", key = "{key}"}}]')
        assert rules(gate, given) == broken
        assert rules(gate, assignment(job())) == [], "the site's own data"
    assert rules(gate, replace(given, sealed=replace(part, manifest="{"))) == ["data_signers"]


def test_every_rule_that_is_broken_is_told(site: Site):
    gate = site.gate(site.signers + "max_rounds = 3\nmin_group = 9\n")
    given = assignment(job(), site.signed(job()))
    assert rules(gate, given) == ["min_group", "max_rounds"]


def test_no_more_leaves_the_site_than_it_allows_and_a_restart_does_not_forget(site: Site, tmp_path: Path):
    most = update_bytes(job())
    text = f"max_bytes_out = {2 * most}"
    gate = site.gate(text)
    assert rules(gate, assignment(job(), name="a1")) == []
    site.outgoing.reserve(JOB, most)
    site.outgoing.reserve(JOB, most)
    assert rules(gate, assignment(job(), name="a1")) == [], "what was let through is on its way"
    assert rules(gate, assignment(job(), name="a2")) == ["max_bytes_out"]
    site.outgoing.settle(JOB, most, most - 1000)
    site.outgoing.settle(JOB, most, 1000)
    assert site.outgoing.spent(JOB) == most

    again = Outgoing(tmp_path / "state" / "outgoing.json")
    gate = Gate(site.file, "cortex", again, site.clock)
    assert rules(gate, assignment(job(), name="a3")) == []
    again.reserve(JOB, 1)
    assert rules(gate, assignment(job(), name="a4")) == ["max_bytes_out"]
    assert rules(gate, replace(assignment(job(), name="a5"), work=Evaluate((0,), 1))) == []


def test_a_job_that_is_submitted_here_breaks_the_rules_that_keep_it_from_running_here(site: Site):
    own = job(data={"train": "ward-7", "partition": {"scheme": "local"}}, placement={"workers": 2})
    for text, broken in (
        ("# no rules", []),
        ('max_rounds = 5\nallowed_datasets = ["ward-7"]\nmin_group = 2', []),
        ("max_rounds = 4", ["max_rounds"]),
        ('allowed_datasets = ["ward-8"]', ["allowed_datasets"]),
        ("min_group = 3", ["min_group"]),
        (site.signers, ["allowed_signers"]),
        (f"max_bytes_out = {update_bytes(own)}", []),
        (f"max_bytes_out = {update_bytes(own) - 1}", ["max_bytes_out"]),
    ):
        assert [each.rule for each in site.gate(text).refusals_of_own(own)] == broken
        if not broken:
            assert rules(site.gate(text), assignment(own)) == broken


def test_a_damaged_count_stops_the_worker_rather_than_begin_at_nothing(tmp_path: Path):
    (tmp_path / "outgoing.json").write_text("{")
    with pytest.raises(CorruptError, match=r"outgoing\.json"):
        Outgoing(tmp_path / "outgoing.json")


def test_a_program_about_one_network_takes_no_job_about_another(site: Site):
    ours = job()
    for hidden, broken in (((32,), []), ((16,), ["model"]), ((), ["model"])):
        model = ours.model.model_copy(update={"hidden_dims": hidden, "dropout": 0.5})
        gate = Gate(None, "cortex", site.outgoing, site.clock, model)
        assert rules(gate, assignment(ours)) == broken


def test_a_policy_that_is_wrong_at_the_start_stops_the_worker(site: Site):
    with pytest.raises(InvalidArgumentError, match="2 mistakes"):
        site.gate("max_rounds = 0\nmax_rouns = 1")
    site.file.unlink()
    with pytest.raises(NotFoundError, match=r"site-policy\.toml"):
        Gate(site.file, "cortex", site.outgoing, site.clock)


async def test_a_policy_that_changes_is_read_again_and_one_that_is_wrong_refuses_everything(site: Site):
    gate = site.gate("max_rounds = 3")
    changes = asyncio.Queue[None]()
    watching = asyncio.create_task(gate.watch(lambda: changes.put_nowait(None)))
    given = assignment(job())
    assert rules(gate, given) == ["max_rounds"]
    for text, told in (
        ("max_rounds = 5", []),
        ("max_rounds = 0", ["site_policy"]),
        ("# no rules\n", []),
        ("", ["site_policy"]),  # about to be written
        ("max_rounds = 3", ["max_rounds"]),
        (None, ["site_policy"]),
    ):
        if text is None:
            site.file.unlink()
        else:
            site.file.write_text(text)
        await site.clock.until_sleeping()
        await site.clock.advance(1)
        changes.get_nowait()
        assert rules(gate, given) == told
    watching.cancel()
