"""What SMoRA is for: tasks that no single linear map can serve; and what breaks when its router does not count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from train.rank_usage import distance, usage_of
from train.smora_layer import Shape, SmoraLinear, Tally

pytestmark = pytest.mark.slow

TASKS, CODE, INNER, OUT = 4, 8, 24, 24


@dataclass
class Conflict:
    """Inputs [code of the task; z] whose target is a map of z of rank 2, another one for every task."""

    codes: Tensor
    maps: Tensor

    @classmethod
    def drawn(cls) -> Conflict:
        generator = torch.Generator().manual_seed(0)
        codes = torch.randn(TASKS, CODE, generator=generator)
        left, right = (torch.randn(TASKS, size, 2, generator=generator) for size in (OUT, INNER))
        return cls(2 * codes, left @ right.transpose(1, 2) / INNER**0.5)

    def rows(self, count: int, generator: torch.Generator, task: int | None = None) -> tuple[Tensor, Tensor]:
        which = torch.randint(TASKS, (count,), generator=generator) if task is None else torch.full((count,), task)
        z = torch.randn(count, INNER, generator=generator)
        return torch.cat([self.codes[which], z], 1), torch.einsum("noi,ni->no", self.maps[which], z)


def error(layer: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((layer(x) - y).square().mean())


@pytest.fixture(scope="module")
def learnt() -> tuple[SmoraLinear, Conflict]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Linear(CODE + INNER, OUT, bias=False)
        base.weight.data.zero_()
        layer = SmoraLinear(base, Shape(16, 4, 8.0), tally=Tally(counting=True))
    conflict, generator = Conflict.drawn(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([value for value in layer.parameters() if value.requires_grad], lr=5e-3)
    for _ in range(1500):
        x, y = conflict.rows(256, generator)
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        layer.balance(layer.counts, 1e-3)
        layer.clear()
    layer.tally.counting = False
    return layer.eval(), conflict


def test_it_learns_what_no_linear_map_can(learnt: tuple[SmoraLinear, Conflict]) -> None:
    """A LoRA of any rank on a base of 0 is at best the best linear map."""
    layer, conflict = learnt
    x, y = conflict.rows(4096, torch.Generator().manual_seed(2))
    best = torch.linalg.lstsq(x, y).solution
    linear = float((x @ best - y).square().mean())
    assert linear > 0.5 * float(y.square().mean())
    found = error(layer, x, y)
    print(f"SMoRA {found:.4f}, the best linear map {linear:.4f}")
    assert found < 0.1 * linear
    order = torch.arange(16).roll(1)
    before = layer.lora_router.detach().clone()
    layer.lora_router.data.copy_(before[order])
    shuffled = error(layer, x, y)
    layer.lora_router.data.copy_(before)
    assert shuffled > 0.5 * linear


def test_conflicting_tasks_use_other_ranks_and_one_task_the_same(learnt: tuple[SmoraLinear, Conflict]) -> None:
    layer, conflict = learnt
    generator = torch.Generator().manual_seed(3)

    def shares(task: int) -> Tensor:
        batch = {"x": conflict.rows(2048, generator, task)[0]}
        found = usage_of(layer, {"": layer}, layer.tally, [batch], lambda model, given: model(given["x"]))
        return found.layers[""].shares

    halves = [(shares(task), shares(task)) for task in range(TASKS)]
    apart = [distance(halves[a][0], halves[b][0]) for a in range(TASKS) for b in range(a)]
    print(f"between tasks {min(apart):.2f} to {max(apart):.2f}")
    assert sum(apart) / len(apart) >= 0.5
    assert max(distance(*pair) for pair in halves) < 0.1


@pytest.mark.parametrize(("rate", "low", "high"), [(1e-3, 1.0, 1.3), (0.0, 2.0, 16.0)])
def test_the_bias_evens_out_a_skewed_router(rate: float, low: float, high: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = SmoraLinear(nn.Linear(12, 6), Shape(16, 4, 8.0), tally=Tally(counting=True))
    offset = 2 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(5)
    for _ in range(2000):
        with torch.no_grad():
            layer(torch.randn(256, 12, generator=generator) + offset)
        layer.balance(layer.counts, rate)
        layer.clear()
    with torch.no_grad():
        layer(torch.randn(4096, 12, generator=generator) + offset)
    counts = layer.counts.double()
    load = float(counts.max() / counts.mean())
    print(f"rate {rate}: {load:.2f}")
    assert low <= load <= high
    assert rate == 0 or float(counts.min()) > 0
