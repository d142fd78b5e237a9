"""GradNormLoRP's parameters: what they decide, what is refused by its name, and what the job is warned of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from train.catalog import parse_parameters
from train.estimate import estimate
from train.options.common import Circumstances, Target
from train.settings import CausalLmTask, TrainingSettings
from train.targets import check_method

TARGETS = [Target("layers.0.q_proj", 64, 48), Target("layers.0.down_proj", 48, 128)]
SIDES = {target.path: (target.d_out, target.d_in) for target in TARGETS}


def circumstances(steps: int | None = 1000, **training: Any) -> Circumstances:
    return Circumstances(TARGETS, TrainingSettings(**training), steps)


def warned(parameters: dict[str, Any], steps: int | None = 1000) -> list[str]:
    options = parse_parameters("gradnormlorp", parameters)
    check_method(options, circumstances(steps))
    return options.warnings(circumstances(steps))


def test_the_projection_is_half_of_the_rank_unless_it_is_told() -> None:
    given: list[tuple[dict[str, Any], int]] = [({}, 4), ({"rank": 1}, 1), ({"rank": 9}, 4), ({"proj_rank": 7}, 7)]
    for parameters, rank in given:
        assert parse_parameters("gradnormlorp", parameters).projection.rank == rank  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"proj_rank": 0}, "proj_rank"),
        ({"proj_rank": 2.5}, "proj_rank"),
        ({"update_proj_gap": 0}, "update_proj_gap"),
        ({"scale": 0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"proj_type": "both"}, "proj_type"),
        ({"optim_bits": 4}, "optim_bits"),
        ({"norm_grad": "none"}, "norm_grad"),
        ({"on_refresh": "forget"}, "on_refresh"),
        ({"defer_first_svd": 1}, "defer_first_svd"),
        ({"mode": "whole"}, "mode"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_what_is_out_of_range_is_refused_where_it_stands(parameters: dict[str, Any], name: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("gradnormlorp", parameters)
    assert [error.pointer for error in caught.value.errors] == [f"/parameters/{name}"]


@pytest.mark.parametrize(
    ("parameters", "training", "pointers", "words"),
    [
        ({"proj_rank": 49}, {}, ["/parameters/proj_rank"], "49 is above 48, the smaller side of layers.0.q_proj"),
        ({"proj_type": "reverse_std", "proj_rank": 8}, {}, ["/parameters/proj_type"], "below 8"),
        ({}, {"optimizer": "sgd"}, ["/training/optimizer"], "take adamw"),
        ({"mode": "full"}, {}, ["/parameters/proj_rank"], "mode full needs it"),
        (
            {"mode": "full", "proj_rank": 4, "rank": 8, "alpha": 16, "dropout": 0.0, "norm_grad": "detach"},
            {},
            ["/parameters/rank", "/parameters/alpha", "/parameters/dropout", "/parameters/norm_grad"],
            "rank belongs to mode adapter",
        ),
        ({"mode": "full", "proj_rank": 4}, {"weight_decay": 0.1}, ["/training/weight_decay"], "full rank"),
        ({"mode": "full", "proj_rank": 48, "proj_type": "reverse_std"}, {}, ["/parameters/proj_type"], "below 48"),
        ({"update_in_backward": True}, {}, ["/training/max_grad_norm"], "1 clips by the norm of all gradients"),
        (
            {"update_in_backward": True},
            {"max_grad_norm": 0, "gradient_accumulation": 2, "precision": "float16"},
            ["/training/gradient_accumulation", "/training/precision"],
            "one backward pass, not 2",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    parameters: dict[str, Any], training: dict[str, Any], pointers: list[str], words: str
) -> None:
    options = parse_parameters("gradnormlorp", parameters)
    with pytest.raises(RequestInvalid) as caught:
        check_method(options, circumstances(**training))
    assert [error.pointer for error in caught.value.errors] == pointers
    assert words in caught.value.errors[0].message


def test_gradients_that_are_freed_one_by_one_need_one_device_and_one_layers_memory() -> None:
    options = parse_parameters("gradnormlorp", {"mode": "full", "proj_rank": 4, "update_in_backward": True})
    one = circumstances(max_grad_norm=0)
    check_method(options, one)
    with pytest.raises(RequestInvalid, match="averaged over 2 devices") as caught:
        check_method(options, replace(one, devices=2))
    assert [error.pointer for error in caught.value.errors] == ["/resources/devices"]
    found = estimate(options, TARGETS, SIDES, one.training, CausalLmTask())
    assert found.gradient_bytes == 4 * (48 * 128 + 48)
    assert found.floor_bytes == found.base_bytes + found.adapter_bytes + found.gradient_bytes + found.optimizer_bytes
    usual = estimate(parse_parameters("gradnormlorp", {}), TARGETS, SIDES, one.training, CausalLmTask())
    assert usual.gradient_bytes == usual.adapter_bytes


def test_the_exact_gradient_may_be_asked_for_in_both_modes() -> None:
    for parameters in ({"norm_grad": "exact"}, {"norm_grad": "exact", "mode": "full", "proj_rank": 4}):
        check_method(parse_parameters("gradnormlorp", parameters), circumstances())


@pytest.mark.parametrize(
    ("parameters", "steps", "words"),
    [
        ({}, 1000, []),
        ({"proj_rank": 8}, 1000, ["lossless and saves nothing: proj_rank 8 is not below rank 8"]),
        ({"rank": 4, "proj_rank": 6}, 1000, ["lossless and saves nothing"]),
        ({"rank": 48, "proj_rank": 47}, 1000, ["The projection saves no memory: the optimiser keeps"]),
        ({"optim_bits": 8}, 1000, ["optim_bits 8 has no effect"]),
        ({"optim_bits": 8, "rank": 40, "proj_rank": 32}, 1000, []),
        ({"update_proj_gap": 10}, 1000, ["a new space every 10 steps"]),
        ({"update_proj_gap": 10}, 10, []),
        ({"update_proj_gap": 10, "on_refresh": "rotate"}, 1000, []),
        ({"mode": "full", "proj_rank": 4}, 200, []),
        ({"mode": "full", "proj_rank": 4}, 2000, ["for 2 of 2 layers the adapter can become as large as the weights"]),
    ],
)
def test_the_job_is_warned_where_nothing_is_saved(parameters: dict[str, Any], steps: int, words: list[str]) -> None:
    found = warned(parameters, steps)
    assert len(found) == len(words), found
    for sentence, word in zip(found, words, strict=True):
        assert word in sentence


def test_the_warning_of_a_lossless_projection_tells_both_sizes() -> None:
    """Moments as large as AdamW's, and a basis of 8×8 for each of four factors on top."""
    (sentence,) = warned({"proj_rank": 8})
    plain = 8 * (8 * (64 + 48 + 48 + 128) + 64 + 48)
    assert f"the optimiser keeps {plain + 4 * 4 * 64:,} bytes, AdamW would keep {plain:,}" in sentence


@pytest.mark.parametrize(
    ("parameters", "trained", "kept"),
    [
        ({}, 8 * 288 + 112, 8 * 4 * 288 + 4 * 4 * 8 * 4 + 8 * 112),
        (
            {"mode": "full", "proj_rank": 4},
            64 * 48 + 48 * 128 + 112,
            # std: 64×48 is projected from the right, 48×128 from the left
            8 * 4 * (64 + 128) + 4 * 4 * (48 + 48) + 8 * 112,
        ),
    ],
)
def test_the_estimate_knows_what_the_optimiser_keeps(parameters: dict[str, Any], trained: int, kept: int) -> None:
    options = parse_parameters("gradnormlorp", parameters)
    found = estimate(options, TARGETS, SIDES, TrainingSettings(), CausalLmTask())
    assert (found.trainable_parameters, found.optimizer_bytes) == (trained, kept)
