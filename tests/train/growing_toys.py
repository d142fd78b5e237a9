"""Independent linear maps that are taught a low-rank change, trained with IncreLoRA's hooks and no loop around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.methods.increlora import Increlora
from train.options.increlora import IncreloraOptions
from train.protocol import MethodContext
from train.settings import TrainingSettings


class Maps(nn.Module):
    """y_i = W_i x_i for every i."""

    def __init__(self, count: int = 3, d_out: int = 6, d_in: int = 5, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(d_in, d_out, bias=False) for _ in range(count))
        for layer in self.layers:
            layer.weight.data.normal_(0, d_in**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(count, n, d_in) → (count, n, d_out)."""
        return torch.stack([layer(part) for layer, part in zip(self.layers, x, strict=True)])


def prepared(
    model: nn.Module,
    total_steps: int = 40,
    method: type[Increlora] = Increlora,
    *,
    seed: int = 5,
    whole: Sequence[str] = (),
    **options: Any,
) -> Increlora:
    """The method on all linear layers but those in `whole`, with the settings of `settings_of`."""
    found = method(IncreloraOptions(**options))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = sorted(set(linear) - set(whole))
    settings = settings_of()
    found.prepare(model, MethodContext(targets, total_steps, lambda: iter(()), settings, seed=seed, whole=whole))
    return found


def settings_of(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**{"learning_rate": 0.01, "schedule": "linear", "warmup_steps": 2} | changes)


def drive(
    method: Increlora,
    model: nn.Module,
    losses: Callable[[int], list[Tensor]],
    steps: int,
    *,
    total_steps: int = 40,
    watch: Callable[[int], None] = lambda step: None,
    **settings: Any,
) -> None:
    """Train: `losses` gives those of the forward passes of a step, `watch` is called before the optimiser's step."""
    used = settings_of(**settings)
    optimizer = method.optimizer(model, used)
    schedule = method.schedule(optimizer, used, total_steps)
    for step in range(steps):
        method.before_step(model, step)
        parts = losses(step)
        for loss in parts:
            extra = method.extra_loss(model)
            whole = loss if extra is None else loss + extra
            (whole / len(parts)).backward()  # type: ignore[no-untyped-call]
        method.before_update(model, step)
        watch(step)
        optimizer.step()
        method.after_update(model, step)
        schedule.step()
        model.zero_grad()


def taught(model: Maps, ranks: list[int], rows: int = 32, seed: int = 1) -> Callable[[int], list[Tensor]]:
    """Losses against the maps with a change of these ranks, one forward pass a step on new inputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for layer, rank in zip(model.layers, ranks, strict=True):
        inner = getattr(layer, "base", layer).weight.detach()
        d_out, d_in = inner.shape
        left, right = (torch.randn(size, rank, generator=generator) for size in (d_out, d_in))
        weights.append(inner + left @ right.T / d_in**0.5)
    teacher = torch.stack(weights)

    def losses(step: int) -> list[Tensor]:
        x = torch.randn(len(ranks), rows, teacher.shape[2], generator=generator)
        return [(model(x) - x @ teacher.transpose(1, 2)).square().mean() * len(ranks)]

    return losses
