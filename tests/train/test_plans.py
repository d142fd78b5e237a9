"""What is known before anything is loaded: targets, ranks, estimates; and the picture of a loss."""

from __future__ import annotations

import math
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from artifacts.errors import RequestInvalid
from train.catalog import METHODS, parse_parameters
from train.estimate import check_fits, estimate
from train.loss_curve import draw
from train.menu_row import ALL_TASKS
from train.options.common import Circumstances
from train.settings import CausalLmTask, TrainingSettings, is_packed
from train.targets import check_method, check_rank, resolve_targets, wanted_targets

LINEAR = {
    "lm_head": (100, 8),
    "model.embed_tokens": (100, 8),
    "model.layers.0.mlp.up_proj": (12, 8),
    "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.1.self_attn.q_proj": (8, 6),
}


def test_all_linear_leaves_embeddings_and_the_head_alone() -> None:
    assert [target.path for target in resolve_targets(LINEAR, "all-linear")] == sorted(LINEAR)[2:]


def test_a_name_means_the_ends_of_paths_at_a_dot() -> None:
    assert [target.path for target in resolve_targets(LINEAR, ["0.self_attn.q_proj"])] == [sorted(LINEAR)[3]]
    assert len(resolve_targets(LINEAR, ["q_proj"])) == 2
    named = resolve_targets(LINEAR, ["unet.model.layers.0.self_attn.q_proj"])
    assert [target.path for target in named] == [sorted(LINEAR)[3]]
    with pytest.raises(RequestInvalid, match="no linear layer called 'proj'"):
        resolve_targets(LINEAR, ["proj"])


def test_a_base_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(RequestInvalid, match="no linear layer"):
        resolve_targets({"wte": (100, 8)}, "all-linear")


@pytest.mark.parametrize(
    ("method", "parameters", "pointer"),
    [
        ("lora", {"rank": 7}, "/parameters/rank"),
        ("miss", {"rank": 7}, "/parameters/rank"),
        ("adalora", {"initial_rank": 7, "target_rank": 2}, "/parameters/initial_rank"),
    ],
)
def test_a_rank_above_the_smallest_side_is_refused(method: str, parameters: dict[str, int], pointer: str) -> None:
    targets = resolve_targets(LINEAR, "all-linear")
    with pytest.raises(RequestInvalid, match=r"Rank 7 is above 6, the smaller side of model.layers.1") as caught:
        check_rank(parse_parameters(method, parameters), targets)
    assert caught.value.errors[0].pointer == pointer
    check_rank(parse_parameters("vera", {"rank": 4096}), targets)


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.options.adapts_layers])
def test_an_embedding_is_refused_by_its_name_and_a_head_is_not(name: str) -> None:
    small = {
        "adalora": {"initial_rank": 3, "target_rank": 2},
        "increlora": {"target_rank": 2},
        "smora": {"rank": 4, "active_rank": 2},
    }
    options = parse_parameters(name, small.get(name, {"rank": 4}))
    with pytest.raises(RequestInvalid, match=r"Model.embed_tokens is an embedding and no linear layer") as caught:
        check_method(options, Circumstances(resolve_targets(LINEAR, ["embed_tokens", "q_proj"]), TrainingSettings()))
    assert [finding.pointer for finding in caught.value.errors] == ["/parameters/target_modules"]
    head = Circumstances(resolve_targets(LINEAR, ["lm_head"]), TrainingSettings())
    if name == "flexora":  # which chooses among numbered layers
        with pytest.raises(RequestInvalid, match="no numbered layer"):
            check_method(options, head)
    else:
        check_method(options, head)


@pytest.mark.parametrize(
    ("training", "steps"), [({}, 3), ({"epochs": 2.5}, 8), ({"gradient_accumulation": 4}, 1), ({"steps": 7}, 7)]
)
def test_the_steps_of_twenty_rows_in_batches_of_eight(training: dict[str, float], steps: int) -> None:
    assert TrainingSettings(**training).steps_for(20) == steps


def test_estimates_know_what_each_method_trains() -> None:
    targets = resolve_targets(LINEAR, "all-linear")
    sides = [(target.d_out, target.d_in) for target in targets]
    wanted = {
        "lora": sum(4 * (d_out + d_in) for d_out, d_in in sides),
        "dora": sum(4 * (d_out + d_in) + d_out for d_out, d_in in sides),
        "lora-fa": sum(4 * d_out for d_out, _ in sides),
        "vera": sum(4 + d_out for d_out, _ in sides),
        "miss": sum(4 * d_out for d_out, _ in sides),
    }
    for method, expected in wanted.items():
        options = parse_parameters(method, {"rank": 4})
        found = estimate(options, targets, LINEAR, TrainingSettings(), CausalLmTask())
        assert found.trainable_parameters == expected, method
        assert found.optimizer_bytes == 8 * expected


def test_prompt_tuning_adapts_no_layer_and_shares_no_row() -> None:
    options = parse_parameters("prompt-tuning", {"virtual_tokens": 7})
    assert wanted_targets(LINEAR, options, CausalLmTask()) == []
    found = estimate(options, [], LINEAR, TrainingSettings(), CausalLmTask())
    assert found.trainable_parameters == 7 * LINEAR["lm_head"][1]
    check_method(options, Circumstances([], TrainingSettings(learning_rate=2e-3)))
    with pytest.raises(RequestInvalid, match="vectors before a row") as caught:
        check_method(options, Circumstances([], TrainingSettings(), packed=is_packed(CausalLmTask(packing=True))))
    assert caught.value.errors[0].pointer == "/task/packing"
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("prompt-tuning", {"target_modules": ["q_proj"]})
    assert caught.value.errors[0].pointer == "/parameters/target_modules"
    assert "2e-3" not in str(options.warnings(Circumstances([], TrainingSettings(learning_rate=2e-3))))
    assert options.warnings(Circumstances([], TrainingSettings(learning_rate=2e-4)))


def test_a_method_is_refused_a_task_that_it_can_not_be_trained_on() -> None:
    METHODS["prompt-tuning"].check_task("causal-lm")
    with pytest.raises(RequestInvalid, match="Prompt tuning can not be trained on the task text-to-image") as caught:
        METHODS["prompt-tuning"].check_task("text-to-image")
    assert caught.value.errors[0].pointer == "/task/type"
    for task in ALL_TASKS:
        METHODS["lora"].check_task(task)


def test_a_tied_head_is_counted_once() -> None:
    targets = resolve_targets(LINEAR, "all-linear")
    found = estimate(parse_parameters("lora", {}), targets, LINEAR, TrainingSettings(), CausalLmTask())
    assert found.base_bytes == 4 * sum(a * b for path, (a, b) in LINEAR.items() if path != "lm_head")


def test_what_can_not_fit_is_refused_with_both_numbers() -> None:
    targets = resolve_targets(LINEAR, "all-linear")
    found = estimate(parse_parameters("lora", {}), targets, LINEAR, TrainingSettings(), CausalLmTask(), 10**12)
    check_fits(found, 5 * 10**12, "the machine")
    with pytest.raises(RequestInvalid, match=r"take 4000\.0 GB; the machine has 1\.0 GB"):
        check_fits(found, 10**9, "the machine")


@pytest.mark.parametrize("losses", [[2.0], [1.0, 1.0, 1.0], [3.0, math.nan, 1e-9], [1e30, 1.0], []])
def test_the_picture_is_valid_whatever_the_losses_are(losses: list[float]) -> None:
    picture = draw([(step, {"loss": loss}) for step, loss in enumerate(losses, 1)], "a <b> & c")
    root = ElementTree.fromstring(picture)
    assert "nan" not in picture
    lines = [item for item in root.iter() if item.tag.endswith("polyline")]
    finite = sum(map(math.isfinite, losses))
    assert [len(str(line.get("points")).split()) for line in lines] == ([finite, finite] if finite else [])


def test_the_menu_needs_no_torch() -> None:
    names = "train.catalog, train.settings, train.targets, train.estimate, train.loss_curve, train.rows"
    code = f"import sys, {names}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_parameter_of_every_method_is_described() -> None:
    for row in METHODS.values():
        for name, field in row.options.model_fields.items():
            assert field.description, f"{row.name}.{name}"
