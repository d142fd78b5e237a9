"""Accumulation, precision and gradient checkpointing in every combination give the training that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

STEPS = 4
RATE = 1e-3
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative. In float32 only the order of the sums is another; bfloat16 keeps 8 bits (0.4 %) of every activation."""
MOVED_TOLERANCE = {"float32": 0.02, "bfloat16": 0.35}
"""Of the distance that the adapter moved. Adam's first steps are ± the learning rate, whatever the gradient's size: a
gradient that is nearly 0 may take the other sign when it is rounded otherwise."""
PRECISION_TOLERANCE = 2e-2
"""Of the loss in bfloat16 against that in float32, relative."""

Found = tuple[list[float], dict[str, Any]]


@pytest.fixture
def trained(trainings: Any) -> Callable[..., Found]:
    """The losses and the adapter of a training on rows whose completions differ in length."""
    rows = [{"prompt": "say ", "completion": "x" * (1 + 7 * (number % 3))} for number in range(24)]

    def run(**settings: Any) -> Found:
        chosen = {"steps": STEPS, "learning_rate": RATE, "schedule": "constant"} | settings
        adapter: Path
        _, adapter, watcher = trainings.run(rows=rows, evaluation={"validation_fraction": 0}, **chosen)
        losses = [watcher.points[step]["loss"] for step in range(1, STEPS + 1)]
        return losses, load_file(adapter / "adapter_model.safetensors")

    return run


def difference(one: Found, other: Found) -> float:
    """Distance of two adapters, as a share of what Adam can have moved an entry by."""
    total = sum(float((value - other[1][name]).square().sum()) for name, value in one[1].items())
    entries = sum(value.numel() for value in one[1].values())
    return float((total / entries) ** 0.5 / (STEPS * RATE))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_combination_gives_the_training_of_the_plain_large_batch(
    trained: Callable[..., Found], precision: str
) -> None:
    plain = trained(precision=precision, batch_size=8, gradient_accumulation=1)
    assert plain[0][-1] < plain[0][0]
    for parts, checkpointing in product((1, 4), (False, True)):
        if (parts, checkpointing) == (1, False):
            continue
        found = trained(
            precision=precision,
            batch_size=8 // parts,
            gradient_accumulation=parts,
            gradient_checkpointing=checkpointing,
        )
        assert found[0] == pytest.approx(plain[0], rel=LOSS_TOLERANCE[precision])
        assert difference(found, plain) < MOVED_TOLERANCE[precision], (parts, checkpointing)
        if parts == 1:
            assert found[0] == plain[0], "activations that are computed twice are the same ones"


def test_a_term_of_the_method_counts_once_in_a_step_however_many_forward_passes_it_has(trainings: Any) -> None:
    """AdaLoRA's orthogonality: with PEFT left to itself the loss of the first step would be larger by 3 times it."""
    losses = []
    for parts in (1, 4):
        parameters = {"initial_rank": 4, "target_rank": 2}
        sizes = {"batch_size": 16 // parts, "gradient_accumulation": parts}
        _, _, watcher = trainings.run("adalora", parameters, steps=1, evaluation={"validation_fraction": 0}, **sizes)
        losses.append(watcher.points[1]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_follows_float32(trained: Callable[..., Found]) -> None:
    settings = {"batch_size": 4, "gradient_accumulation": 2, "gradient_checkpointing": True}
    exact, rounded = (trained(precision=precision, **settings) for precision in ("float32", "bfloat16"))
    assert rounded[0] == pytest.approx(exact[0], rel=PRECISION_TOLERANCE)
