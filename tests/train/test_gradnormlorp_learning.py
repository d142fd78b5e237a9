"""What GradNormLoRP is for: it learns what DoRA learns, of which a LoRA of the rank can not, with less optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.normalized_layers import LowRankNormalizedLinear
from train.projected_adamw import ProjectedAdamW, state_bytes
from train.projection import Projection

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

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
