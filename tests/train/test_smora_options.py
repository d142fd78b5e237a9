"""Options of SMoRA: what is refused when a training is submitted, and what is said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from train.catalog import parse_parameters
from train.options.common import Circumstances, Target
from train.options.smora import SmoraOptions
from train.settings import TrainingSettings
from train.targets import check_method

KNOWN = Circumstances([Target("model.q_proj", 96, 64), Target("model.v_proj", 16, 64)], TrainingSettings())


def parsed(**parameters: Any) -> SmoraOptions:
    options = parse_parameters("smora", parameters)
    assert isinstance(options, SmoraOptions)
    return options


@pytest.mark.parametrize(
    ("parameters", "pointer", "words"),
    [
        ({"rank": 4}, "/parameters/active_rank", "8 are more than the rank, 4"),
        (
            {"rank": 32, "active_rank": 17},
            "/parameters/active_rank",
            "17 is above 16, the smaller side of",
        ),
        ({"rank": 64, "rank_partition": 6, "active_rank": 6}, "/parameters/rank_partition", "no multiple of"),
        ({"rank": 16, "rank_partition": 4, "active_rank": 6}, "/parameters/active_rank", "an expert would be split"),
    ],
)
def test_what_can_not_be_done_is_refused_where_it_was_asked_for(
    parameters: dict[str, Any], pointer: str, words: str
) -> None:
    with pytest.raises(RequestInvalid) as caught:
        check_method(parsed(**parameters), KNOWN)
    (error,) = caught.value.errors
    assert error.pointer == pointer
    assert words in error.message


def test_folding_needs_tasks_that_are_measured_and_not_packed() -> None:
    grouped = replace(KNOWN, grouped=True)
    check_method(parsed(fold="per_task"), grouped)
    for known, words in ((KNOWN, "evaluation.group_column"), (replace(grouped, packed=True), "task.packing")):
        with pytest.raises(RequestInvalid) as caught:
            check_method(parsed(fold="per_task"), known)
        (error,) = caught.value.errors
        assert error.pointer == "/parameters/fold"
        assert words in error.message


@pytest.mark.parametrize(
    "parameters",
    [{"epsilon_greedy": 0.1}, {"dense_compute": True}, {"bias_update_rate": -1e-3}, {"dropout": 1.0}, {"alpha": 0}],
)
def test_unknown_flags_and_values_out_of_range_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parsed(**parameters)
    assert caught.value.errors[0].pointer == f"/parameters/{next(iter(parameters))}"


def test_the_rank_may_be_above_the_sides_for_few_components_are_on() -> None:
    check_method(parsed(rank=64), KNOWN)


def test_the_scaling_is_alpha_over_k() -> None:
    assert (parsed().numerator, parsed(active_rank=4).numerator, parsed(alpha=3.0).numerator) == (16.0, 8.0, 3.0)


def test_the_router_is_counted() -> None:
    assert parsed().parameters_of(96, 64) == 64 * (96 + 2 * 64)
    assert parsed(rank_partition=8).parameters_of(96, 64) == 64 * (96 + 64) + 8 * 64


def test_a_router_that_can_not_learn_is_told() -> None:
    assert any("no gradient reaches the router" in text for text in parsed(active_rank=1).warnings(KNOWN))
    assert any("no gradient" in text for text in parsed(rank_partition=8).warnings(KNOWN))
    assert parsed().warnings(KNOWN) == []
    assert any("negative" in text for text in parsed(bias_in_gate=True).warnings(KNOWN))
