"""What SMoRA is for: tasks that no single linear map can serve; and what breaks when its router does not count."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_lm import SmallLanguageModel
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


def trained(shape: Shape, *, router: str = "learns") -> tuple[SmoraLinear, Conflict]:
    """A layer on a base of 0, after 1500 steps on all tasks; its router learns, is frozen as drawn, or is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Linear(CODE + INNER, OUT, bias=False)
        base.weight.data.zero_()
        layer = SmoraLinear(base, shape, tally=Tally(counting=True))
    if router == "constant":
        layer.lora_router.data.zero_()
    layer.lora_router.requires_grad_(router == "learns")
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


@pytest.fixture(scope="module")
def learnt() -> tuple[SmoraLinear, Conflict]:
    return trained(Shape(16, 4, 8.0))


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


@pytest.mark.parametrize(
    ("shape", "router"),
    [(Shape(16, 4, 8.0), "frozen"), (Shape(16, 16, 32.0), "constant"), (Shape(16, 4, 8.0, 4), "learns")],
    ids=["frozen router", "a LoRA", "blocks"],
)
def test_without_a_router_that_learns_or_with_whole_blocks_it_stays_far_behind(
    learnt: tuple[SmoraLinear, Conflict], shape: Shape, router: str
) -> None:
    """One block of four components for a token is a mixture of LoRAs, whose router gets no gradient."""
    layer, conflict = learnt
    x, y = conflict.rows(4096, torch.Generator().manual_seed(2))
    other = error(trained(shape, router=router)[0], x, y)
    print(f"SMoRA {error(layer, x, y):.4f}, {router} {other:.4f}")
    assert error(layer, x, y) < 0.1 * other


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


@pytest.mark.timeout(600)
def test_three_tasks_of_a_language_model_lose_less_than_with_a_lora_of_the_active_rank() -> None:
    """The first two layers of SmolLM2; four components of 16 for a token, and a LoRA of rank 4, two seeds."""
    words = SmallLanguageModel.load("dates", "orders", "numbers", rows=64, size=6)
    run = {"steps": 128, "learning_rate": 3e-3, "shuffled": True, "linear": True}
    found: dict[str, list[dict[str, float]]] = {}
    for name, parameters in (("lora", {"rank": 4}), ("smora", {"rank": 16, "active_rank": 4})):
        models = [words.train(name, parameters, seed=seed, **run).model for seed in (0, 1)]  # type: ignore[arg-type]
        found[name] = [words.losses(model) for model in models]
    for task in words.of_tasks:
        own, lora = (sum(seed[task] for seed in found[name]) / 2 for name in ("smora", "lora"))
        print(f"{task}: SMoRA {own:.3f}, LoRA {lora:.3f}")
        assert own < lora


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


# Each of the processes has its part of every batch. Writes what the training came to.
RANK = """
import json, os, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

folder, tests, rank, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, tests)
from small_nets import Net, in_batches, prepare, regression_rows

torch.set_num_threads(1)
torch.manual_seed(0)
model = Net()
rows = regression_rows(64)
method = prepare(
    "smora", {"rank": 6, "active_rank": 2, "bias_update_rate": 0.01}, model, in_batches(rows), learning_rate=0.01
)
whole = model
if size > 1:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    whole = DistributedDataParallel(model, broadcast_buffers=False)
optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.01)
loads = []
for step in range(12):
    method.before_step(model, step)
    first = 16 * (step % 4)
    for half in (0, 1):  # two passes a step
        part = slice(first + 8 * half, first + 8 * half + 8)
        batch = {name: value[part].chunk(size)[rank] for name, value in rows.items()}
        with method.forward_pass(batch):
            loss = whole(**batch).loss / 2
        loss.backward()
    optimizer.step()
    method.after_update(model, step)
    optimizer.zero_grad()
    loads.append(method.metrics()["load_max_over_mean"])
print(json.dumps({
    "loads": loads,
    "bias": {path: layer.lora_bias.tolist() for path, layer in method.routed.items()},
    "router": {path: layer.lora_router.flatten().tolist() for path, layer in method.routed.items()},
}))
if size > 1:
    distributed.destroy_process_group()
# As the ranks of a job end: gloo's threads live as long as the wrapped model, and one that lets go of a tensor while
# the interpreter is being torn down aborts the process.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.timeout(300)
def test_two_devices_balance_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    def start(rank: int, size: int) -> subprocess.Popen[str]:
        arguments = [str(tmp_path), str(Path(__file__).parent), str(rank), str(size)]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, *arguments], stdout=subprocess.PIPE, text=True
        )

    def result(process: subprocess.Popen[str]) -> Any:
        printed, _ = process.communicate(timeout=250)
        assert process.returncode == 0
        return json.loads(printed.splitlines()[-1])

    alone = result(start(0, 1))
    both = [result(process) for process in [start(0, 2), start(1, 2)]]
    assert both[0] == both[1]
    assert both[0]["loads"] == pytest.approx(alone["loads"])
    assert any(abs(value) > 0.05 for value in alone["bias"]["first"])
    for path, bias in alone["bias"].items():
        assert both[0]["bias"][path] == pytest.approx(bias, abs=1e-6)
        assert both[0]["router"][path] == pytest.approx(alone["router"][path], rel=1e-3, abs=1e-5)
