"""What GradNormLoRP is for: it learns what DoRA learns, of which a LoRA of the rank can not, with less optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import Trainings

from examples.minilm.base_model import base_model_directory
from examples.smollm2.tasks import TASKS, make_items
from train.normalized_layers import LowRankNormalizedLinear
from train.projected_adamw import ProjectedAdamW, state_bytes
from train.projection import Projection

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

D_OUT, D_IN, STEPS, RATE = 48, 64, 600, 1e-2


class Lora(nn.Module):
    """W + B·A of rank 2, for comparison."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = weight
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, D_IN), a=5**0.5))
        self.lora_B = nn.Parameter(torch.zeros(D_OUT, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.lora_B @ self.lora_A).T


def problem(change: int) -> tuple[Tensor, Tensor]:
    """W, and W with other lengths of its rows and a change of so many ranks."""
    drawn = torch.Generator().manual_seed(1)
    weight = torch.randn(D_OUT, D_IN, generator=drawn) / D_IN**0.5
    target = torch.linspace(0.5, 1.6, D_OUT)[:, None] * weight
    for _ in range(change):
        target = target + torch.outer(*(torch.randn(n, generator=drawn) / n**0.5 for n in (D_OUT, D_IN))) * 2
    return weight, target


def learn(layer: nn.Module, optimizer: torch.optim.Optimizer, target: Tensor) -> float:
    """Mean squared error of the outputs at the end."""
    drawn = torch.Generator().manual_seed(2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        x = torch.randn(64, D_IN, generator=drawn)
        optimizer.zero_grad()
        (layer(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        schedule.step()
    x = torch.randn(512, D_IN, generator=drawn)
    with torch.no_grad():
        return float((layer(x) - x @ target.T).square().mean())


def lora(change: int) -> float:
    weight, target = problem(change)
    layer = Lora(weight, 2)
    return learn(layer, torch.optim.AdamW(layer.parameters(), lr=RATE, weight_decay=0.0), target)


def normalized(change: int, rank: int, exact: bool, **projection: Any) -> tuple[float, int]:
    """The error, and the bytes that the optimiser keeps."""
    weight, target = problem(change)
    linear = nn.Linear(D_IN, D_OUT, bias=False)
    linear.weight.data.copy_(weight)
    torch.manual_seed(0)
    layer = LowRankNormalizedLinear(linear, rank, 1.0, 0.0, exact=exact)
    groups = [{"params": [layer.lora_A, layer.lora_B], "projected": True}, {"params": [layer.magnitude]}]
    optimizer = ProjectedAdamW(groups, Projection(**{"rank": 2, "interval": 50} | projection), lr=RATE)
    error = learn(layer, optimizer, target)
    return error, state_bytes(optimizer)


CASES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "r 2, R 2": (2, False, {}),
    "r 4, R 2": (4, False, {}),
    "exact": (2, True, {}),
    "8 bits": (2, False, {"bits": 8}),
    "rotated": (4, False, {"on_refresh": "rotate"}),
}


@pytest.mark.parametrize(("change", "share"), [(0, 1e-3), (2, 1e-2)])
def test_lengths_of_rows_are_learnt_that_no_lora_of_the_rank_learns(
    change: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import projected_adamw, projection

    # Else nothing of a layer this small would be kept in 8 bits.
    monkeypatch.setattr(projection, "FEWEST", 1)
    monkeypatch.setattr(projected_adamw, "FEWEST", 1)
    plain = lora(change)
    errors = {name: normalized(change, rank, exact, **more)[0] for name, (rank, exact, more) in CASES.items()}
    print(change, f"{plain:.2e}", {name: f"{error:.1e}" for name, error in errors.items()})
    for name, error in errors.items():
        assert error < share * plain, f"{name}: {error:.2e}, LoRA {plain:.2e}"


def test_a_real_encoder_learns_as_with_dora_and_the_optimiser_keeps_half(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 tells which of ten colours was ordered; r = 8, R = 4, three seeds."""
    items = [item for split in ("train", "held_out") for item in make_items(TASKS["orders"], split, 160)]  # type: ignore[arg-type]
    rows = [{"text": item.prompt, "label": item.completion.rpartition("=")[2]} for item in items]
    trainings = Trainings(tmp_path, base_model_directory())
    settings: dict[str, Any] = {
        "task": {"type": "sequence-classification", "max_length": 64},
        "rows": rows,
        "evaluation": {"validation_fraction": 0.4, "max_rows": 200},
        "steps": 60,
        "batch_size": 8,
        "gradient_accumulation": 1,
        "learning_rate": 5e-3,
    }
    layers = {"rank": 8, "target_modules": ["query", "value"]}
    methods = {"dora": layers, "gradnormlorp": layers | {"proj_rank": 4, "update_proj_gap": 20}}
    accuracies: dict[str, list[float]] = {}
    for name, parameters in methods.items():
        reports = [trainings.run(name, parameters, seed=seed, **settings)[0] for seed in (0, 1, 2)]
        accuracies[name] = [report.evaluation["after"]["accuracy"] for report in reports]
    kept = reports[0].own["optimizer"]
    factors = 8 * 12 * 8 * (384 + 384)  # AdamW's moments of A and B of twelve layers, bytes
    share = (kept["bytes"] - (kept["adamw_bytes"] - factors)) / factors
    print(accuracies, f"bytes of A and B {share:.3f} of DoRA's")
    own, dora = (sum(accuracies[name]) / 3 for name in ("gradnormlorp", "dora"))
    assert dora > 0.3  # of ten colours
    assert own >= dora - 0.01
    assert share == pytest.approx(4 / 8, rel=0.02)
