"""ALLoRA in training: what its row factors do to the growth of the rows, and to the loss of a language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from allora_layers import drawn, factors, layer_of, trained_once
from torch import Tensor, nn

from train.catalog import find_method, parse_parameters
from train.methods.allora import AlloraLinear
from train.protocol import MethodContext
from train.settings import TrainingSettings

STEPS, EARLY, LATE = 120, 10, 40


def grown(eta: float, rate: float, *, ordinary: bool = False) -> list[dict[str, Tensor]]:
    """Plain descent of a small network; per step the norms of all rows of B·A before and after it, and their s."""
    torch.manual_seed(0)
    first, second = AlloraLinear(nn.Linear(16, 24), 4, eta**-2), AlloraLinear(nn.Linear(24, 12), 4, eta**-2)
    x, of_first, of_second = (drawn(*size, seed=seed, dtype=torch.float32) for seed, size in enumerate(SIZES))
    target = torch.tanh(x @ of_first.T) @ of_second.T
    layers, found = (first, second), []
    optimizer = torch.optim.SGD([value for layer in layers for value in (layer.lora_A, layer.lora_B)], lr=rate)
    for _ in range(STEPS):
        for layer in layers:
            layer.renew_row_factor()
            if ordinary:
                layer.row_factor = torch.ones_like(layer.row_factor)
        optimizer.zero_grad()
        (second(torch.tanh(first(x))) - target).square().mean().backward()
        before = row_norms(layers)
        optimizer.step()
        s = torch.cat([layer.row_factor for layer in layers])
        found.append({"before": before, "s": s, "after": row_norms(layers)})
    return found


def row_norms(layers: Sequence[AlloraLinear]) -> Tensor:
    return torch.cat([(layer.lora_B @ layer.lora_A).detach().norm(dim=1) for layer in layers])


SIZES = ((64, 16), (24, 16), (12, 24))


@pytest.mark.slow
def test_rows_leave_the_start_faster_and_then_slow_down() -> None:
    means = {
        name: [float(step["after"].mean()) for step in run]
        for name, run in {
            "eta 1": grown(1.0, 0.02),
            "eta 2": grown(2.0, 0.02),
            "LoRA": grown(1.0, 0.02, ordinary=True),
            "LoRA, rate times 2": grown(1.0, 0.04, ordinary=True),
        }.items()
    }
    assert means["eta 2"][EARLY] > 1.9 * means["eta 1"][EARLY]
    assert means["eta 2"][EARLY] > 1.9 * means["LoRA"][EARLY]
    assert means["eta 2"][EARLY] == pytest.approx(means["LoRA, rate times 2"][EARLY], rel=0.05)
    late = {name: (values[-1] - values[LATE]) / (STEPS - LATE) for name, values in means.items()}
    assert late["eta 2"] < 0.85 * late["LoRA, rate times 2"]


@pytest.mark.slow
def test_rows_that_are_larger_take_relatively_smaller_steps_at_all_times() -> None:
    for step in grown(2.0, 0.02):
        ordered = step["s"][step["before"].argsort()]
        assert bool((ordered.diff() <= 1e-5).all())  # but for rounding
    assert float(step["s"].max() / step["s"].min()) > 1.1
    # A plain LoRA from the same state moves every row of B by its whole gradient.
    layer, ordinary = layer_of(), layer_of(scale_B=False)
    for each in (layer, ordinary):
        with torch.no_grad():
            each.lora_B.copy_(factors(torch.float32)[1])
    start = layer.lora_B.detach().clone()
    trained_once(layer)
    trained_once(ordinary)
    steps = [(each.lora_B.detach() - start).norm(dim=1) for each in (layer, ordinary)]
    norms = (start @ layer_of().lora_A.detach()).norm(dim=1)
    assert (steps[0] / steps[1]).argsort().tolist() == norms.argsort(descending=True).tolist()


def smollm2_losses(base: tuple[Any, Tensor], placement: str, eta: float, steps: int) -> tuple[list[float], Tensor]:
    """Losses before each of the steps under AdamW, and B of the last layer's down_proj after the first."""
    model, ids = copy.deepcopy(base[0]), base[1]
    parameters = {"rank": 4, "eta": eta, "placement": placement}
    method = find_method("allora").load(parse_parameters("allora", parameters))
    settings = TrainingSettings(learning_rate=1e-3)
    targets = [f"model.layers.{number}.mlp.{name}_proj" for number in (0, 1) for name in ("up", "down")]
    torch.manual_seed(0)
    method.prepare(model, MethodContext(targets, steps, lambda: iter(()), settings))
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = method.optimizer(model, settings) or torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    losses, first = [], torch.empty(0)
    for step in range(steps):
        method.before_step(model, step)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step == 0:
            first = model.get_submodule(targets[-2]).lora_B.detach().clone()
    return losses, first


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_on_a_language_model_under_adamw_eta_speeds_up_the_update_and_not_the_gradient(
    smollm2: tuple[Any, Tensor],
) -> None:
    found = {
        (placement, eta): smollm2_losses(smollm2, placement, eta, 8)
        for placement in ("gradient", "update")
        for eta in (1.0, 8.0)
    }
    first, eighth = (found["gradient", eta][1] for eta in (1.0, 8.0))
    # Where a gradient is as small as Adam's ε, it does not cancel.
    assert float((first - eighth).norm() / first.norm()) < 0.02
    first, eighth = (found["update", eta][1] for eta in (1.0, 8.0))
    torch.testing.assert_close(8 * first, eighth, rtol=1e-4, atol=1e-9)
    slow, fast = (found["update", eta][0] for eta in (1.0, 8.0))
    weak = [found["gradient", eta][0][-1] for eta in (1.0, 8.0)]
    assert fast[-1] < slow[-1] - 0.1
    assert abs(weak[0] - weak[1]) < 0.25 * (slow[-1] - fast[-1])


# Whole trainings.
