"""The empirical Fisher of a base model's weights, row by row (arXiv:2311.12023, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import FieldError, RequestInvalid, TrainingDiverged
from train.tasks.protocol import Task
from train.tasks.rows import IGNORED


def estimate_fisher(
    task: Task[Any],
    model: nn.Module,
    rows: Sequence[Any],
    paths: Mapping[str, str],
    progress: Callable[[float], None],
) -> dict[str, Tensor]:
    """F = Σ_rows (∂loss/∂W)², entry by entry, each row alone, with its mean loss; the model as in evaluation.

    Args:
        paths: path in the files → path in the model, of the linear layers.
        progress: called with the fraction done; may raise to stop.

    Returns:
        Path in the files → F, (d_out, d_in) float32 on the CPU.

    Raises:
        TrainingDiverged: a loss or a gradient is NaN or infinite.
    """
    model.eval().requires_grad_(False)
    weights = {path: model.get_parameter(f"{name}.weight") for path, name in paths.items()}
    sums = {path: torch.zeros(weight.shape, dtype=torch.float32) for path, weight in weights.items()}
    own = task.loss()
    handles = []
    for path, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(
            weight.register_post_accumulate_grad_hook(_taker(sums[path]))  # type: ignore[no-untyped-call]
        )
    device = next(model.parameters()).device
    try:
        for number, row in enumerate(rows):
            progress(number / len(rows))
            batch = {name: value.to(device) for name, value in task.collate([row]).items()}
            with torch.enable_grad():
                given = task.step_inputs(dict(batch), 0)
                if own is None:
                    loss = model(**given).loss
                else:
                    labels = given.pop("labels")
                    loss = own(model(**given), labels, (batch["labels"] != IGNORED).sum().clamp(min=1))
                if not bool(loss.isfinite()):
                    raise TrainingDiverged(f"The loss of row {number} of the Fisher is {float(loss.detach())}.")
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        model.requires_grad_(False)
    for path, found in sums.items():
        if not bool(found.isfinite().all()):
            raise TrainingDiverged(f"The gradient of {path} is NaN or infinite.")
    return sums


def placed(model: nn.Module, paths: Sequence[str]) -> dict[str, str]:
    """Path in the files → path in the model: classes with a head put a component before it.

    Raises:
        RequestInvalid: the task's model has no such layer.
    """
    modules = dict(model.named_modules())
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {}
    for path in paths:
        names = (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}."))
        name = next((name for name in names if name in modules), None)
        if name is None:
            problem = f"the model of the task has no layer {path}, so it has no gradient there"
            raise RequestInvalid(
                f"T{problem[1:]}.",
                hint="Leave it out of target_modules.",
                errors=[FieldError("/parameters/target_modules", problem)],
            )
        found[path] = name
    return found


def _taker(total: Tensor) -> Callable[[Tensor], None]:
    def take(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        total.add_(gradient.to(device=total.device, dtype=torch.float32).square_())

    return take
