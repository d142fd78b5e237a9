"""Small residual towers with a LoRA in every layer, trained with Flexora's hooks and no loop around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.methods.flexora import Flexora
from train.options.flexora import FlexoraOptions
from train.protocol import MethodContext
from train.settings import TrainingSettings

Batch = Mapping[str, Tensor]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + torch.tanh(self.proj(x))
        return changed


class Tower(nn.Module):
    """x → head(layers(x)); every layer adds to what it is given."""

    def __init__(self, count: int = 4, width: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(count))
        self.head = nn.Linear(width, width)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.normal_(0, width**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        made: Tensor = self.head(x)
        return made


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    error: Tensor = (model(batch["x"]) - batch["y"]).square().mean()
    return error


def prepared(
    model: Tower,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 20,
    loss: Callable[[nn.Module, Batch], Tensor] = squared_error,
    whole: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int = 5,
    **options: Any,
) -> Flexora:
    """The method on every `proj`, with the rows (x, y) to train on."""
    method = Flexora(FlexoraOptions(**{"rank": 2, "validation_rows": 4, "validation_batches": 2} | options))
    used = TrainingSettings(**{"learning_rate": 0.01, "schedule": "constant", "batch_size": 4} | dict(settings or {}))
    context = MethodContext(
        [f"layers.{number}.proj" for number in range(len(model.layers))],
        steps,
        lambda: iter(()),
        used,
        seed=seed,
        whole=whole,
        loss=loss,
        rows=len(x),
        batch_of=lambda numbers: {"x": x[list(numbers)], "y": y[list(numbers)], "rows": torch.tensor(list(numbers))},
    )
    method.prepare(model, context)
    return method


def drive(method: Flexora, model: nn.Module, steps: int, *, watch: Callable[[int], None] = lambda step: None) -> None:
    """Train on the rows that are not held out (all, in the second stage); `watch` is called at the end of a step."""
    context = method.context
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=context.settings.learning_rate, weight_decay=0.0)
    schedule = method.schedule(optimizer, context.settings, context.total_steps)
    generator = torch.Generator().manual_seed(context.seed)
    withheld = method.withheld()
    for step in range(steps):
        rows = [row for row in range(context.rows) if step >= withheld.steps or row not in withheld.rows]
        chosen = torch.randint(len(rows), (context.settings.batch_size,), generator=generator)
        method.before_step(model, step)
        model.train()
        context.loss(model, context.batch_of([rows[int(at)] for at in chosen])).backward()
        method.before_update(model, step)
        optimizer.step()
        method.after_update(model, step)
        watch(step)
        schedule.step()
        optimizer.zero_grad()
