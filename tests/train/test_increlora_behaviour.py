"""What IncreLoRA is for: the layers that matter get the ranks. And that several devices grow as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from growing_toys import Maps, drive, prepared, taught
from torch import Tensor, nn

from train.growing_layers import DEVIATION, GrowingLinear, distance_from_orthonormal
from train.methods.increlora import Increlora
from train.options.increlora import IncreloraOptions

PLANTED = [0, 4, 0, 0, 1, 0]
"""Ranks of what six maps are taught; those with 0 have nothing to learn."""
STEPS, GROWN = 900, 430
"""The length of the schedule, and where the growth has ended."""


class Chance(Increlora):
    """Lets layers grow at random: the control."""

    def choose(self) -> dict[str, int]:
        ranks = {path: layer.rank for path, layer in self.growing.items()}
        largest = {path: layer.largest for path, layer in self.growing.items()}
        names = list(ranks)
        order = [names[at] for at in torch.randperm(len(names), generator=self._generator)]
        return self.plan.shares(order, ranks, largest)


def planted(kind: type[Increlora], seed: int) -> tuple[Increlora, float]:
    """Six ranks to give away among the six maps; returns the method and the error at the end."""
    model = Maps(6, 24, 24, seed=seed)
    method = prepared(
        model, STEPS, kind, seed=seed, total_rank=12, increment=1, layers_per_round=1, interval=60, alpha=8.0
    )
    losses = taught(model, PLANTED, seed=seed + 10)
    drive(method, model, losses, GROWN, total_steps=STEPS, learning_rate=5e-3, warmup_steps=60)
    with torch.no_grad():
        return method, float(losses(0)[0])


def found_the_planted(method: Increlora) -> bool:
    ranks = [layer.rank for layer in method.growing.values()]
    return ranks[1] >= 4 and all(rank == 1 for rank, taught_ in zip(ranks, PLANTED, strict=True) if taught_ == 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ranks_go_where_something_is_to_be_learnt_and_chance_does_not_find_it(seed: int) -> None:
    scored, error = planted(Increlora, seed)
    assert found_the_planted(scored)
    assert sum(layer.rank for layer in scored.growing.values()) == 12
    control, missed = planted(Chance, seed)
    assert sum(layer.rank for layer in control.growing.values()) == 12
    assert not found_the_planted(control)
    assert missed > 5 * error


def test_components_in_advance_are_closer_to_orthonormal_than_fresh_ones() -> None:
    """At the moment at which they begin to count; those that had a single step are as fresh ones."""
    residuals = {}
    for interval in (60, 1):
        model = Maps(2, 24, 24)
        method = prepared(model, 100, total_rank=6, increment=2, layers_per_round=2, interval=interval, wait=0)
        losses = taught(model, [4, 4])
        drive(method, model, losses, interval + 1, total_steps=100, learning_rate=5e-3, warmup_steps=10)
        assert [layer.rank for layer in method.growing.values()] == [3, 3]
        residuals[interval] = [_residuals(layer) for layer in method.growing.values()]
    assert all(advanced < 0.8 * fresh for advanced, fresh in residuals[60]), residuals
    assert all(advanced > 0.95 * fresh for advanced, fresh in residuals[1]), residuals


def _residuals(layer: GrowingLinear) -> tuple[float, float]:
    """‖AAᵀ − I‖ with the two components that were activated last, and with fresh ones in their place."""
    rows = layer.lora_A.detach()[: layer.rank]
    fresh = rows.clone()
    fresh[-2:] = torch.randn(2, layer.d_in, generator=torch.Generator().manual_seed(0)) * DEVIATION
    return float(distance_from_orthonormal(rows)), float(distance_from_orthonormal(fresh))


class Reader(nn.Module):
    """The first two layers of SmolLM2, read at the last token."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(folder)
        config.num_hidden_layers = 2
        self.encoder = AutoModel.from_pretrained(folder, config=config, dtype=torch.float32)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1])
        return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_layer_of_a_real_model_gets_far_more_than_the_mean() -> None:
    """AdaLoRA starts every layer at 1.5 times the mean rank, which none of them can pass."""
    from transformers import AutoTokenizer

    from examples.smollm2.base_model import base_model_directory

    folder = base_model_directory()
    torch.manual_seed(0)
    model = Reader(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    things = {"cat": 0, "dog": 0, "horse": 0, "cow": 0, "red": 1, "blue": 1, "green": 1, "pink": 1}
    texts = [(f"It is the {word}", label) for word, label in things.items()]
    ids = torch.tensor([tokenizer(text).input_ids for text, _ in texts])
    labels = torch.tensor([label for _, label in texts])
    method = prepared(model, 60, whole=["head"], target_rank=2, layers_per_round=2, interval=5)

    def losses(step: int) -> list[Tensor]:
        return [nn.functional.cross_entropy(model(ids), labels)]

    first = float(losses(0)[0].detach())
    drive(method, model, losses, 60, total_steps=60, warmup_steps=5, learning_rate=5e-3)
    ranks = [layer.rank for layer in method.growing.values()]
    assert sum(ranks) == 2 * len(ranks) == 28
    assert max(ranks) > 1.5 * 2
    assert float(losses(0)[0].detach()) < 0.1 * first


# Each of two processes has half of the batch. Writes what the training came to.
RANK = """
import json, os, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

folder, tests, rank, size, score = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
sys.path.insert(0, tests)
from growing_toys import Maps, drive, prepared

torch.set_num_threads(1)
model = Maps()
method = prepared(model, target_rank=2, layers_per_round=2, interval=4, score=score)
whole = model
if size > 1:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    whole = DistributedDataParallel(model)
generator = torch.Generator().manual_seed(0)
target = torch.randn(3, 6, 5, generator=generator)


def losses(step):
    x = torch.randn(3, 8, 5, generator=generator)
    mine = x.chunk(size, 1)[rank]
    return [(whole(mine) - mine @ target.transpose(1, 2)).square().mean()]


drive(method, model, losses, 14)
print(json.dumps({
    "history": method.history,
    "importance": method.importance.state(),
    "lambda": [layer.lora_lambda[: layer.rank].tolist() for layer in method.growing.values()],
}))
if size > 1:
    distributed.destroy_process_group()
# As the ranks of a job end: gloo's threads live as long as the wrapped model, and one that lets go of a tensor while
# the interpreter is being torn down aborts the process.
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("score", ["gradient", "lambda"])
def test_two_devices_grow_as_one_with_the_whole_batch(tmp_path: Path, score: str) -> None:
    def start(rank: int, size: int) -> subprocess.Popen[str]:
        arguments = [str(tmp_path), str(Path(__file__).parent), str(rank), str(size), score]
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
    assert len(alone["history"]) == 2
    assert both[0]["history"] == alone["history"]
    for kind in ("mean", "deviation"):
        assert both[0]["importance"][kind] == pytest.approx(alone["importance"][kind], rel=1e-4)
    for found, wanted in zip(both[0]["lambda"], alone["lambda"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_activations_that_are_recomputed_score_the_same() -> None:
    from torch.utils.checkpoint import checkpoint

    found = []
    for recomputed in (False, True):
        model = Maps()
        method = prepared(model, **IncreloraOptions(target_rank=2).model_dump(exclude_unset=True))
        for layer in method.growing.values():
            layer.lora_lambda.data[: layer.rank] = 0.3
        x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))

        def losses(step: int, model: Maps = model, x: Tensor = x, recomputed: bool = recomputed) -> list[Tensor]:
            y = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
            assert isinstance(y, Tensor)
            return [y.square().mean()]

        drive(method, model, losses, 3)
        found.append((method.importance.state(), [layer.lora_A.detach() for layer in method.growing.values()]))
    assert found[0][0] == found[1][0]
    for plain, again in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(plain, again)
