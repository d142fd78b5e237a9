"""Gradients of the loss with regard to whole frozen weights, summed over training rows within a bound of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from artifacts.errors import FieldError, RequestInvalid, TrainingDiverged
from train.protocol import loss_of_model

SUM_BYTES = 4
LEAST_ROWS = 16
_SHARE = 1000  # one row in so many, as the authors of LoRA-SB take
# What the loss is multiplied by, so that gradients in float16 neither vanish nor overflow.
_SCALES = {torch.float16: (2.0**16, 2.0**10, 2.0**4, 1.0)}

Row = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Row], Tensor]


@dataclass(frozen=True, slots=True)
class FullGradient:
    """The gradient of one weight.

    Attributes:
        paths: of the modules that have this weight: several if it is shared.
        total: (d_out, d_in) float32: the sum over the rows of the gradient of each row's mean loss.
    """

    paths: tuple[str, ...]
    total: Tensor


def pick_rows(batches: Callable[[], Iterator[Row]], samples: int | None, seed: int) -> list[Row]:
    """Rows drawn without replacement from all batches, each as a batch of its own.

    Args:
        samples: how many; None takes a thousandth of all, at least 16 or as many as there are.

    Raises:
        RequestInvalid: there are fewer rows than `samples`.
    """
    count = sum(_rows(batch) for batch in batches())
    wanted = min(count, max(LEAST_ROWS, math.ceil(count / _SHARE))) if samples is None else samples
    if wanted > count:
        problem = f"{wanted} samples were asked for, and there are {count} training rows"
        raise RequestInvalid(f"The first step: {problem}.", errors=[FieldError("/parameters/samples", problem)])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = set(order[:wanted].tolist())
    found: list[Row] = []
    first = 0
    for batch in batches():
        size = _rows(batch)
        found += [
            {name: value[number : number + 1].clone() for name, value in batch.items()}
            for number in range(size)
            if first + number in chosen
        ]
        first += size
    return found


def full_gradients(
    model: nn.Module,
    paths: Sequence[str],
    rows: Sequence[Row],
    *,
    memory_bytes: int,
    seed: int,
    loss: Loss = loss_of_model,
    checkpointing: bool = False,
) -> Iterator[FullGradient]:
    """The gradient of every weight, one after another, in as many passes over the rows as the memory makes necessary.

    Every row counts alike, with the mean loss of its tokens. The model is in training mode meanwhile; when a gradient
    is given out, its modes, what is trainable in it and torch's random numbers are as before, and so are all weights.

    Args:
        paths: of linear layers.
        memory_bytes: bound on the sums that are kept at once; a single larger weight has a pass of its own.
        seed: of the model's own dropout, the same in every pass.
        loss: of the model on a row.
        checkpointing: recompute activations instead of keeping them, where the model can.

    Raises:
        RequestInvalid: a layer whose weight is quantised, that the loss does not depend on, or whose gradient is 0.
        TrainingDiverged: the loss or a gradient is NaN or infinite.
    """
    for group in grouped(shared_weights(model, paths), memory_bytes):
        sums = _sums(model, group, rows, seed, loss, checkpointing)
        for _, sharing in group:
            total = sums.pop(0)
            turned = not isinstance(model.get_submodule(sharing[0]), nn.Linear)
            yield FullGradient(sharing, total.T if turned else total)
            del total


def shared_weights(model: nn.Module, paths: Sequence[str]) -> list[tuple[nn.Parameter, tuple[str, ...]]]:
    """Every weight once, with the paths of the layers that have it. Raises RequestInvalid for a quantised one."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            kind = getattr(weight, "dtype", type(weight).__name__)
            problem = f"the weight of {path} is quantised ({kind}); a gradient needs it in full precision"
            raise RequestInvalid(
                f"T{problem[1:]}.",
                hint="Register the base model in float32, bfloat16 or float16.",
                errors=[FieldError("/base_model", problem)],
            )
        found.setdefault(id(weight), (weight, []))[1].append(path)
    return [(weight, tuple(sharing)) for weight, sharing in found.values()]


def grouped(
    weights: Sequence[tuple[nn.Parameter, tuple[str, ...]]], memory_bytes: int
) -> list[list[tuple[nn.Parameter, tuple[str, ...]]]]:
    """The weights in order, cut so that the sums of each part fit."""
    groups: list[list[tuple[nn.Parameter, tuple[str, ...]]]] = []
    left = 0
    for weight, sharing in weights:
        size = weight.numel() * SUM_BYTES
        if not groups or size > left:
            groups.append([])
            left = memory_bytes
        groups[-1].append((weight, sharing))
        left -= size
    return groups


def _sums(
    model: nn.Module,
    group: Sequence[tuple[nn.Parameter, tuple[str, ...]]],
    rows: Sequence[Row],
    seed: int,
    loss: Loss,
    checkpointing: bool,
) -> list[Tensor]:
    weights = [weight for weight, _ in group]
    scales = _SCALES.get(weights[0].dtype, (1.0,))
    for scale in scales:
        with _estimating(model, weights, seed, checkpointing):
            sums = _accumulate(model, weights, rows, loss, scale)
        if all(total is None or bool(total.isfinite().all()) for total in sums):
            break
    else:
        raise TrainingDiverged("A gradient before the first step is NaN or infinite.")
    unused = [path for (_, sharing), total in zip(group, sums, strict=True) if total is None for path in sharing]
    silent = [
        path
        for (_, sharing), total in zip(group, sums, strict=True)
        if total is not None and not total.any()
        for path in sharing
    ]
    _refuse(unused, "the loss does not depend on {}")
    _refuse(silent, "the gradient of {} is 0 on all samples")
    return [total for total in sums if total is not None]


def _accumulate(
    model: nn.Module, weights: Sequence[nn.Parameter], rows: Sequence[Row], loss: Loss, scale: float
) -> list[Tensor | None]:
    """The sums over all rows; None for a weight that got no gradient."""
    sums: list[Tensor | None] = [None] * len(weights)

    def taker(place: int) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None  # moved away at once: no second weight's gradient beside it
            assert gradient is not None
            total = sums[place]
            if total is None:
                total = sums[place] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            total.add_(gradient, alpha=1 / scale)

        return take

    handles = [
        weight.register_post_accumulate_grad_hook(taker(place))  # type: ignore[no-untyped-call]
        for place, weight in enumerate(weights)
    ]
    try:
        for row in rows:
            value = loss(model, row)
            if not bool(value.isfinite()):
                raise TrainingDiverged(f"The loss before the first step is {float(value.detach())}.")
            if value.requires_grad:  # it does not where none of the weights is used
                (value * scale).backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    return sums


@contextmanager
def random_apart(model: nn.Module, seed: int) -> Iterator[None]:
    """Torch's random numbers start at `seed` and are put back afterwards, on the CPU and on the model's device."""
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _estimating(model: nn.Module, weights: Sequence[nn.Parameter], seed: int, checkpointing: bool) -> Iterator[None]:
    """The model as the estimate needs it, and as it was afterwards."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    enable = getattr(model, "activation_checkpointing_enable", None) if checkpointing else None
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        model.train()
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with random_apart(model, seed), torch.enable_grad():
            yield
    finally:
        if enable is not None:
            model.activation_checkpointing_disable()  # type: ignore[operator]
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode


def _refuse(paths: Sequence[str], problem: str) -> None:
    if not paths:
        return
    named = problem.format(", ".join(paths[:20]))
    raise RequestInvalid(
        f"{named[0].upper()}{named[1:]}.",
        hint="Leave these layers out of target_modules, or estimate on more samples.",
        errors=[FieldError("/parameters/target_modules", problem.format(path)) for path in paths],
    )


def _rows(batch: Row) -> int:
    return len(next(iter(batch.values())))
