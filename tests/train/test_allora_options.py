"""ALLoRA's parameters: what is taken, what is refused by its name, and what the job is warned of."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from train.catalog import parse_parameters
from train.options.common import Circumstances
from train.settings import TrainingSettings


def test_eta_may_be_given_as_it_is_or_squared() -> None:
    found = [parse_parameters("allora", given) for given in ({}, {"eta": 2}, {"eta_sq": 4}, {"eta_sq": 2.0})]
    assert [options.inverse_eta_sq for options in found] == [0.25, 0.25, 0.25, 0.5]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("parameters", "name", "message"),
    [
        ({"eta": 2, "eta_sq": 4}, "eta_sq", "give eta or eta_sq, not both"),
        ({"eta": 0}, "eta", "greater than 0"),
        ({"eta": -1}, "eta", "greater than 0"),
        ({"eta": float("inf")}, "eta", "finite"),
        ({"eta": float("nan")}, "eta", "finite"),
        ({"eta": 1e-30}, "eta", "must be between"),
        ({"eta_sq": 1e39}, "eta_sq", "must be between"),
        ({"rank": 0}, "rank", "greater than or equal to 1"),
        ({"dropout": 0.05}, "dropout", "without dropout"),
        ({"rank": 8, "alpha": 16}, "alpha", "scaling alpha/r is 1"),
        ({"use_rslora": True}, "use_rslora", "rank-stabilised"),
        ({"use_dora": True}, "use_dora", "DoRA"),
        ({"placement": "optimizer"}, "placement", "'gradient' or 'update'"),
    ],
)
def test_what_does_not_belong_to_the_method_is_refused_by_name(
    parameters: dict[str, Any], name: str, message: str
) -> None:
    with pytest.raises(RequestInvalid, match=message) as caught:
        parse_parameters("allora", parameters)
    assert [error.pointer for error in caught.value.errors] == [f"/parameters/{name}"]


def test_what_says_the_same_as_leaving_it_out_is_taken() -> None:
    parse_parameters("allora", {"rank": 8, "alpha": 8, "dropout": 0, "use_rslora": False, "use_dora": False})


@pytest.mark.parametrize(
    ("parameters", "optimizer", "words"),
    [
        ({}, "adamw", ["acts only weakly"]),
        ({}, "sgd", []),
        ({"placement": "update"}, "adamw", []),
        ({"placement": "update", "eta": 8}, "adamw", []),
        ({"placement": "update", "eta_sq": 100}, "adamw", ["An eta of 10 is above"]),
        ({"eta": 9}, "adamw", ["acts only weakly", "An eta of 9 is above"]),
    ],
)
def test_the_job_is_warned_where_eta_acts_weakly_or_too_much(
    parameters: dict[str, Any], optimizer: str, words: list[str]
) -> None:
    known = Circumstances([], TrainingSettings(optimizer=optimizer))
    found = parse_parameters("allora", parameters).warnings(known)
    assert len(found) == len(words)
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence
