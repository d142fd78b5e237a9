"""A linear layer that has to learn a matrix of known singular values: which error is the best at each rank is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from train.catalog import find_method, parse_parameters
from train.protocol import MethodContext, TrainMethod
from train.settings import TrainingSettings

SINGULAR_VALUES = (8.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)
SIZE, ROWS, RATE = 32, 512, 5e-3


def eckart_young(rank: int) -> float:
    """The smallest ‖T − ΔW‖² (Frobenius) of any ΔW of this rank."""
    return sum(value**2 for value in SINGULAR_VALUES[rank:])


def teacher() -> tuple[Tensor, Tensor]:
    """(T, the inputs): 32×32 with the singular values above, and 512 rows of standard normal numbers."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator))[0][:, : len(SINGULAR_VALUES)] for _ in range(2)
    )
    target = left @ torch.diag(torch.tensor(SINGULAR_VALUES)) @ right.T
    return target, torch.randn(ROWS, SIZE, generator=generator)


class Student(nn.Module):
    """A layer of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.name_or_path = "acme/student"

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


def learn(method: str, parameters: dict[str, Any], steps: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(lora_A, lora_B) after so many full-batch steps of AdamW without weight decay, the rate falling along a line."""
    target, inputs = teacher()
    wanted = inputs @ target.T
    torch.manual_seed(seed)
    settings = TrainingSettings(steps=steps, learning_rate=RATE)
    made: TrainMethod[Any] = find_method(method).load(parse_parameters(method, parameters))
    context = MethodContext(["linear"], steps, lambda: iter(()), settings, seed=seed, task_type=None)
    model = made.prepare(Student(), context)
    model.train()
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    made.schedule(optimizer, settings, steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        made.before_step(model, step)
        ((model(inputs) - wanted) ** 2).sum(1).mean().backward()
        made.before_update(model, step)
        optimizer.step()
        made.after_update(model, step)
        optimizer.zero_grad()
    found = {name.split("lora_")[1][0]: value.detach() for name, value in model.named_parameters() if "lora_" in name}
    return found["A"], found["B"]


def error(factors: tuple[Tensor, Tensor], rank: int, scaling: float) -> float:
    """‖T − scaling·B[:, :b]·A[:b]‖² (Frobenius)."""
    a, b = factors
    return float((teacher()[0] - scaling * b[:, :rank] @ a[:rank]).square().sum())
