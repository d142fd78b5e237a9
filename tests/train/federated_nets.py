"""Clients of a federated training on a small net, for the tests of FFA-LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from small_nets import Net, regression_rows
from torch import Tensor, nn

from train.catalog import METHODS, parse_parameters
from train.federation.local_steps import LocalPlan, Noise
from train.protocol import MethodContext
from train.settings import TrainingSettings

ROWS = regression_rows()
COUNT = len(ROWS["inputs"])
SGD = {"optimizer": "sgd", "schedule": "constant", "max_grad_norm": 0.0}


def clients_of(count: int) -> list[dict[str, str]]:
    return [{"dataset": f"dat_{number:032x}"} for number in range(count)]


# --- local steps, on a net of two layers ---


def toy(rank: int = 4, **parameters: Any) -> nn.Module:
    """The net with FFA-LoRA; lora_A from seed 5."""
    return adapted(Net(), {"rank": rank, **parameters})


def adapted(net: Any, parameters: dict[str, Any], seed: int = 5) -> nn.Module:
    """A net of layers `first` and `second` with FFA-LoRA; lora_A from the seed."""
    net.name_or_path = "toy"
    method = METHODS["ffa-lora"].load(parse_parameters("ffa-lora", parameters))
    context = MethodContext(
        targets=["first", "second"],
        total_steps=1,
        batches=lambda: iter(()),
        settings=TrainingSettings(),
        task_type=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return method.prepare(net, context)


def losses(model: nn.Module, rows: Sequence[int]) -> Tensor:
    """(rows,) mean squared differences."""
    chosen = list(rows)
    outputs = model(ROWS["inputs"][chosen], ROWS["labels"][chosen]).outputs
    found: Tensor = (outputs - ROWS["labels"][chosen]).square().mean(dim=1)
    return found


def local_plan(steps: int = 1, noise: Noise | None = None, **changes: Any) -> LocalPlan:
    settings = {"learning_rate": 0.5, "batch_size": COUNT, **SGD} | changes
    rows_at_once = settings.pop("rows_at_once", 7)
    return LocalPlan(TrainingSettings(**settings), steps, 0, steps, 3, rows_at_once, noise)


def factors(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters() if ".lora_" in name}
