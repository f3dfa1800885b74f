"""Outer optimisers and their options, as a job file gives them."""

from __future__ import annotations

from typing import get_args

import pytest

from cortex_common.errors import InvalidArgumentError
from cortex_common.job.parse import parse_job
from cortex_common.job.spec import AggregationSpec
from cortex_common.job.strategies import STRATEGY_OPTIONS, StrategyName, complete_options
from cortex_common.job.wire import spec_from_proto, spec_to_proto

JOB = {"model": {"input_dim": 4, "output_dim": 2}, "data": {"train": "digits"}}
RATE = "allowed: a number above 0"
DECAY = "allowed: a number from 0 to below 1"


def mistakes(aggregation: dict) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_job({**JOB, "aggregation": aggregation})
    return [(each.path.removeprefix("aggregation."), each.message) for each in caught.value.violations]


def test_every_mistake_is_named_at_once() -> None:
    options = {"server_learning_rate": 0, "momentum": 1.0, "beta1": "{x}"}
    assert mistakes({"strategy": "diloco", "options": options, "quorum": 3}) == [
        ("options.server_learning_rate", f"0 given; {RATE}"),
        ("options.momentum", f"1.0 given; {DECAY}"),
        ("options.beta1", "unknown option of diloco; allowed: momentum, server_learning_rate"),
        ("quorum", "3 given; allowed: less than or equal to 1"),
    ]


@pytest.mark.parametrize("value", [0, -1, True, "1", None, [1], float("nan"), float("inf"), 10**400])
def test_a_learning_rate_is_a_number_above_0(value: object) -> None:
    ((path, message),) = mistakes({"options": {"server_learning_rate": value}})
    assert path == "options.server_learning_rate"
    assert message.endswith(RATE)


@pytest.mark.parametrize("value", [1, -0.1, True, "0.9", float("nan")])
def test_a_decay_is_a_number_from_0_to_below_1(value: object) -> None:
    ((path, message),) = mistakes({"strategy": "fedadam", "options": {"beta2": value}})
    assert path == "options.beta2"
    assert message.endswith(DECAY)


def test_an_unknown_strategy_is_the_only_mistake_then() -> None:
    ((path, message),) = mistakes({"strategy": "sgd", "options": {"x": 1}})
    assert path == "strategy"
    assert all(name in message for name in get_args(StrategyName))


@pytest.mark.parametrize("strategy", get_args(StrategyName))
def test_defaults_are_allowed_documented_and_completed(strategy: StrategyName) -> None:
    defaults = complete_options(strategy, {})
    spec = parse_job({**JOB, "aggregation": {"strategy": strategy, "options": defaults}})
    assert spec_from_proto(spec_to_proto(spec)) == spec
    assert complete_options(strategy, spec.aggregation.options) == defaults
    assert complete_options(strategy, {"server_learning_rate": 2}) == defaults | {"server_learning_rate": 2.0}
    documented = " ".join((AggregationSpec.__doc__ or "").split())
    for name, option in STRATEGY_OPTIONS[strategy].items():
        assert f"{name} {option.default:g}" in documented


def test_an_aggregator_names_every_mistake_too() -> None:
    with pytest.raises(InvalidArgumentError, match="strategy 'x'; allowed are fedavg, fedavgm, diloco"):
        complete_options("x", {})
    with pytest.raises(InvalidArgumentError) as caught:
        complete_options("fedavgm", {"momentum": 1, "tau": 1})
    assert [each.path for each in caught.value.violations] == ["momentum", "tau"]
