"""IncreLoRA's options: what is refused, where it is wrong; what is warned of; what is estimated."""

from __future__ import annotations

from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from train.options.common import Circumstances, Target
from train.options.increlora import IncreloraOptions
from train.settings import TrainingSettings
from train.targets import check_method

TARGETS = [Target("layers.0.q", 8, 8), Target("layers.0.up", 16, 8)]


@pytest.mark.parametrize(
    ("options", "training", "steps", "pointer", "words"),
    [
        ({"initial_rank": 3, "target_rank": 2}, {}, None, "target_rank", "a budget of 4 is below 6"),
        ({"total_rank": 1}, {}, None, "total_rank", "a budget of 1 is below 2"),
        ({"target_rank": 9, "increment": 1}, {}, None, "target_rank", "above 8, the smaller side of layers.0.q"),
        ({"total_rank": 17}, {}, None, "total_rank", "a mean rank of 8.5 is above 8"),
        ({"target_rank": 5}, {}, None, "increment", "has to be given with a target_rank of 5"),
        ({"layers_per_round": 3}, {}, None, "layers_per_round", "3 are more than the 2 adapted layers"),
        ({"target_rank": 2, "interval": 10}, {}, 30, "interval", "the last of 2 rounds would be at step 30, beyond"),
        ({"target_rank": 2}, {"warmup_steps": 10}, 40, "interval", "step 30 and its warm-up of 10 steps"),
    ],
)
def test_what_can_not_be_done_is_refused_where_it_is_wrong(
    options: dict[str, Any], training: dict[str, Any], steps: int | None, pointer: str, words: str
) -> None:
    known = Circumstances(TARGETS, TrainingSettings(**training), steps)
    with pytest.raises(RequestInvalid) as caught:
        check_method(IncreloraOptions(**options), known)
    assert [(item.pointer, words in item.message) for item in caught.value.errors] == [(f"/parameters/{pointer}", True)]


def test_an_estimate_counts_the_mean_rank_and_what_is_in_advance() -> None:
    options = IncreloraOptions(target_rank=4)
    assert options.parameters_of(16, 8) == (4 + 2) * (16 + 8) + 4


def test_growth_beyond_the_last_epoch_is_refused_before_the_first_step(trainings: Any) -> None:
    """How many rows there are is known when the dataset has been read."""
    with pytest.raises(RequestInvalid, match="last of 4 rounds would be at step 10, beyond the training of 4 steps"):
        trainings.run("increlora", {"target_rank": 2, "interval": 2}, steps=None, epochs=1)


def test_what_can_be_done_is_not_refused() -> None:
    for steps in (None, 41):
        known = Circumstances(TARGETS, TrainingSettings(warmup_steps=10), steps)
        check_method(IncreloraOptions(target_rank=2), known)
    assert "72 % of the training" not in " ".join(IncreloraOptions(target_rank=2).warnings(known))
    late = Circumstances(TARGETS, TrainingSettings(warmup_steps=10), 42)
    assert "during 71 % of the training" in " ".join(IncreloraOptions(target_rank=2).warnings(late))
    early = Circumstances(TARGETS, TrainingSettings(warmup_steps=10), 50)
    assert IncreloraOptions(target_rank=2).warnings(early) == []
    cold = Circumstances(TARGETS, TrainingSettings(), 100)
    assert "Without training.warmup_steps" in IncreloraOptions(target_rank=2).warnings(cold)[0]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("initial_rank", [0]),
        ("increment", [0]),
        ("layers_per_round", [0]),
        ("interval", [0]),
        ("wait", [-1]),
        ("beta1", [0.0, 1.0]),
        ("beta2", [0.0, 1.0]),
        ("orthogonality", [-0.1]),
        ("reserve_weight", [0.0, 2e-3]),
        ("alpha", [0.0]),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=field):
            IncreloraOptions(**{field: value})
