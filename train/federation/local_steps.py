"""A client's steps between two averages: plain, or with DP-SGD (arXiv:1607.00133) by opacus."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from train.learning_rates import rate_at
from train.settings import TrainingSettings

Losses = Callable[[nn.Module, Sequence[Any]], Tensor]
"""(model, rows) → (rows,) the loss of each row by itself."""


@dataclass(frozen=True, slots=True)
class Noise:
    """DP-SGD of one client.

    Attributes:
        multiplier: σ; the noise of a step has the standard deviation σ·C.
        clip_norm: C, of the gradient of a row over all trained tensors.
        rate: q, with which each row is drawn in a step.
        seed: None: from the system's entropy.
    """

    multiplier: float
    clip_norm: float
    rate: float
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """The steps of a client in a round.

    Attributes:
        steps: E.
        first_step: the number of its first step in the whole run, for the schedule, which has `total_steps`.
        rows_at_once: most rows of one forward pass.
        seed: of the order of the rows and of dropout.
    """

    training: TrainingSettings
    steps: int
    first_step: int
    total_steps: int
    seed: int
    rows_at_once: int
    noise: Noise | None = None


def seed_of(seed: int, round_: int, client: int, what: str) -> int:
    """A seed of its own for every client, round and use: the first 63 bits of a digest."""
    digest = sha256(f"{seed}/{round_}/{client}/{what}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def train_locally(
    model: nn.Module, rows: Sequence[Any], losses: Losses, plan: LocalPlan, tick: Callable[[], None] = lambda: None
) -> float | None:
    """E steps on `model`, in place, with an optimiser that begins anew.

    Args:
        tick: called before each step; raises to stop.

    Returns:
        The mean loss of the steps' rows; None with noise: the loss of private rows is told nobody.
    """
    model.train()
    torch.manual_seed(plan.seed)
    if plan.noise is None:
        return _plain(model, rows, losses, plan, tick)
    _private(model, rows, losses, plan, plan.noise, tick)
    return None


def _plain(model: nn.Module, rows: Sequence[Any], losses: Losses, plan: LocalPlan, tick: Callable[[], None]) -> float:
    parameters = _trained(model)
    optimizer = _optimizer(parameters, plan.training)
    order = _order(len(rows), plan.training.batch_size, torch.Generator().manual_seed(plan.seed))
    total = 0.0
    for step in range(plan.steps):
        tick()
        batch = [rows[number] for number in next(order)]
        optimizer.zero_grad()
        for part in _parts(batch, plan.rows_at_once):
            loss = losses(model, part).sum() / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if plan.training.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, plan.training.max_grad_norm)
        _set_rate(optimizer, plan, step)
        optimizer.step()
    return total / plan.steps


def _private(
    model: nn.Module, rows: Sequence[Any], losses: Losses, plan: LocalPlan, noise: Noise, tick: Callable[[], None]
) -> None:
    """Each row is in a batch with the probability q, apart from all others; the sum of the clipped gradients and the
    noise is divided by the expected size of a batch (arXiv:1607.00133, algorithm 1)."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    device = next(model.parameters()).device
    seeds = [
        secrets.randbits(63) if noise.seed is None else seed_of(noise.seed, 0, 0, use) for use in ("rows", "noise")
    ]
    drawing = torch.Generator().manual_seed(seeds[0])
    watched = GradSampleModule(model, batch_first=True, loss_reduction="sum")
    optimizer = DPOptimizer(
        _optimizer(_trained(model), plan.training),
        noise_multiplier=noise.multiplier,
        max_grad_norm=noise.clip_norm,
        expected_batch_size=plan.training.batch_size,
        loss_reduction="mean",
        generator=torch.Generator(device).manual_seed(seeds[1]),
    )
    try:
        with warnings.catch_warnings():
            # Of the first layers, whose inputs come from frozen weights: the hook gets what it needs all the same.
            warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
            for step in range(plan.steps):
                tick()
                drawn = torch.rand(len(rows), generator=drawing) < noise.rate
                batch = [rows[number] for number in drawn.nonzero()[:, 0].tolist()]
                _set_rate(optimizer, plan, step)
                _private_step(watched, optimizer, list(_parts(batch, plan.rows_at_once)), losses)
    finally:
        watched.to_standard_module()


def _private_step(watched: Any, optimizer: Any, parts: Sequence[Sequence[Any]], losses: Losses) -> None:
    optimizer.zero_grad()
    if not parts:  # nobody was drawn: the step is noise alone
        for parameter in optimizer.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
        optimizer.step()
    for number, part in enumerate(parts, 1):
        losses(watched, part).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.signal_skip_step(do_skip=number < len(parts))
        optimizer.step()
        optimizer.zero_grad()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _optimizer(parameters: list[nn.Parameter], training: TrainingSettings) -> Optimizer:
    make: Any = AdamW if training.optimizer == "adamw" else SGD
    made: Optimizer = make(parameters, lr=training.learning_rate, weight_decay=training.weight_decay)
    return made


def _set_rate(optimizer: Any, plan: LocalPlan, step: int) -> None:
    training = plan.training
    share = rate_at(training.schedule, plan.first_step + step, plan.total_steps, training.warmup_steps)
    for group in optimizer.param_groups:
        group["lr"] = training.learning_rate * share


def _order(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of `size` of the rows' numbers without end; every row once before any comes again, but for the rest of a
    pass that fills no batch."""
    while True:
        numbers: list[int] = torch.randperm(rows, generator=generator).tolist()
        for start in range(0, rows - size + 1, size):
            yield numbers[start : start + size]


def _parts(batch: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(batch), size):
        yield batch[start : start + size]
