"""A site's rules: the file, and which of them a job breaks."""

from __future__ import annotations

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.site_policy import Signer, SitePolicy, refusals, signature_refusals, update_bytes
from cortex_common.job.spec import JobSpec

KEY_A, KEY_B = "ed25519:" + "A" * 43 + "=", "ed25519:" + "B" * 43 + "="
SIGNERS = f"""
allowed_signers = [{{name = "ann", key = "{KEY_A}", orgs = ["north"]}}, {{name = "bob", key = "{KEY_B}"}}]
"""

LAYERS = {"input_dim": 64, "hidden_dims": [32], "output_dim": 10}
START = LAYERS | {"init_from": "/m/a.safetensors"}
ELSEWHERE = LAYERS | {"init_from": "/m/../private/b.safetensors"}


def policy(text: str) -> SitePolicy:
    return SitePolicy.parse(text, "site-policy.toml")


def job(**sections: object) -> JobSpec:
    base = {"model": {"input_dim": 64, "hidden_dims": [32], "output_dim": 10}, "data": {"train": "digits"}}
    return parse_job(base | sections)


def broken(text: str, spec: JobSpec, seats: int = 100) -> list[str]:
    return [each.rule for each in refusals(policy(text), spec, seats)]


def test_a_policy_without_rules_takes_every_job():
    assert broken("", job()) == []


@pytest.mark.parametrize(
    ("rule", "allowed", "refused"),
    [
        ("max_rounds = 5", {"training": {"rounds": 5}}, {"training": {"rounds": 6}}),
        ("max_local_epochs = 2", {"training": {"local_epochs": 2}}, {"training": {"local_epochs": 2.5}}),
        ("max_local_epochs = 2", {}, {"training": {"local_steps": 1}}),
        ("max_local_steps = 10", {"training": {"local_steps": 10}}, {"training": {"local_steps": 11}}),
        ("max_local_steps = 10", {"training": {"local_steps": 0}}, {}),
        ("max_local_seconds = 9", {"training": {"local_seconds": 9}}, {"training": {"local_seconds": 10}}),
        ("min_group = 3", {"placement": {"workers": 3}}, {"placement": {"workers": 3, "min_workers": 2}}),
        ("min_group = 3", {"placement": {"workers": 4}}, {"placement": {"workers": 4}, "aggregation": {"quorum": 0.5}}),
        ('allowed_datasets = ["digits"]', {}, {"data": {"train": "digits", "test": "digits-test"}}),
        ('allowed_init_from = ["/m/a.safetensors"]', {"model": START}, {"model": ELSEWHERE}),
        ("allowed_init_from = []", {}, {"model": START}),
        ("require_secure_aggregation = false", {}, None),
        ("require_secure_aggregation = true", None, {}),
        ("require_differential_privacy = {max_epsilon = 8}", None, {}),
    ],
)
def test_each_rule_lets_through_what_it_allows_and_no_more(
    rule: str, allowed: dict[str, object] | None, refused: dict[str, object] | None
):
    if allowed is not None:
        assert broken(rule, job(**allowed)) == []
    if refused is not None:
        assert broken(rule, job(**refused)) == [rule.partition(" ")[0]]


def test_limits_in_two_units_allow_either():
    text = "max_local_epochs = 2\nmax_local_steps = 10"
    assert broken(text, job(training={"local_epochs": 1})) == []
    assert broken(text, job(training={"local_steps": 10})) == []
    assert broken(text, job(training={"local_seconds": 1})) == ["max_local_epochs"]


def test_a_group_is_not_larger_than_the_seats_there_are():
    assert broken("min_group = 3", job(placement={"workers": 3}), seats=2) == ["min_group"]


def test_differential_privacy_must_be_strong_enough():
    rule = policy("require_differential_privacy = {max_epsilon = 8, max_delta = 1e-5}")
    spec = job()

    def with_privacy(**changes: object) -> JobSpec:
        settings = spec.privacy.differential_privacy.model_copy(update={"enabled": True, **changes})
        privacy = spec.privacy.model_copy(update={"differential_privacy": settings})
        return spec.model_copy(update={"privacy": privacy})

    assert refusals(rule, with_privacy(epsilon_budget=8.0), 9) == []
    for weak in (with_privacy(), with_privacy(epsilon_budget=8.1), with_privacy(epsilon_budget=8.0, delta=1e-4)):
        assert [each.rule for each in refusals(rule, weak, 9)] == ["require_differential_privacy"]


def test_a_network_that_is_not_built_in_is_custom_code():
    spec = job()
    foreign = spec.model_copy(update={"model": spec.model.model_copy(update={"kind": "plugin"})})
    assert broken("", foreign) == ["custom_code"]
    assert broken("custom_code = true", foreign) == []


def test_a_refusal_says_what_is_given_and_what_is_allowed():
    (refusal,) = refusals(policy("max_rounds = 5"), job(training={"rounds": 9}), 4)
    assert str(refusal) == "max_rounds: training.rounds 9 wanted; allowed: up to 5"


@pytest.mark.parametrize(
    ("who", "organisation", "rules"),
    [
        (["ann"], "north", []),
        (["ann"], "south", ["allowed_signers", "allowed_orgs"]),
        (["bob"], "north", []),
        (["bob"], "south", ["allowed_orgs"]),
        ([], "north", ["allowed_signers"]),
    ],
)
def test_signers_count_for_their_own_organisations(who: list[str], organisation: str, rules: list[str]):
    rule = policy('allowed_orgs = ["north", "west"]\n' + SIGNERS)
    known = [signer for signer in rule.allowed_signers if signer.name in who]
    assert [each.rule for each in signature_refusals(rule, known, organisation, is_signed=True)] == rules


def test_as_many_must_have_signed_as_the_site_wants():
    rule = policy("signatures = 2\n" + SIGNERS)
    both: list[Signer] = list(rule.allowed_signers)
    assert signature_refusals(rule, both, "north", is_signed=True) == []
    assert len(signature_refusals(rule, both[:1], "north", is_signed=True)) == 1
    (unsigned,) = signature_refusals(rule, [], "", is_signed=False)
    assert "not signed; allowed: signed by 2 of ann, bob" in unsigned.message


def test_all_mistakes_of_a_file_are_told_at_once():
    with pytest.raises(InvalidArgumentError) as refused:
        policy(
            'max_rounds = 0\nmax_rouns = 3\nmax_bytes_out = "2 furlongs"\nallowed_signers = [{name = "x", key = "y"}]'
        )
    paths = {each.path for each in refused.value.violations}
    assert paths == {"max_rounds", "max_rouns", "max_bytes_out", "allowed_signers.0.key"}
    assert "did you mean 'max_rounds'" in refused.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_rounds = ", "is not TOML"),
        (f'allowed_signers = [{{name = "a", key = "{KEY_A}"}}, {{name = "b", key = "{KEY_A}"}}]', "given twice"),
        ("signatures = 3\n" + SIGNERS, "1 to the number of signers"),
        ('allowed_orgs = ["north"]', "without allowed_signers"),
    ],
)
def test_rules_that_make_no_sense_are_refused(text: str, told: str):
    with pytest.raises(InvalidArgumentError, match=told):
        policy(text)


def test_the_largest_update_is_a_bound_with_room_for_what_surrounds_it():
    assert update_bytes(job()) >= 4 * (64 * 32 + 32 + 32 * 10 + 10)
