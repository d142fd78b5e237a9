"""AdamW whose moments live in a small subspace of the gradients, renewed every so many steps (arXiv:2403.03507)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from artifacts.errors import TrainingDiverged
from train.block_quantization import Blocks, decode_signed, decode_square, encode_signed, encode_square
from train.projection import FEWEST, Projection
from train.truncated_svd import truncated_svd

BETAS, EPSILON = (0.9, 0.999), 1e-6
_NOTHING = 1e-12  # a gradient whose entries have no larger root mean square has no directions
_SMALL_SIDE = 64  # up to here the smaller Gram matrix gives the directions of a thin gradient at once
_CODES: Mapping[str, torch.dtype] = {"first_codes": torch.int8, "second_codes": torch.uint8}


@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal directions of a gradient D (rows×columns).

    Attributes:
        left: (rows, R), of its columns; None if they are not projected.
        right: (R, columns), of its rows; None likewise.
    """

    left: Tensor | None
    right: Tensor | None

    def down(self, D: Tensor) -> Tensor:
        """Z: D in the subspace."""
        Z = D if self.left is None else self.left.T @ D
        return Z if self.right is None else Z @ self.right.T

    def up(self, Z: Tensor) -> Tensor:
        """Out of the subspace, (rows, columns)."""
        found = Z if self.left is None else self.left @ Z
        return found if self.right is None else found @ self.right


def find_basis(D: Tensor, rank: int, left: bool, right: bool) -> Basis:
    """The leading singular vectors of D, in its precision."""
    rank = min(rank, *D.shape)
    if min(D.shape) > _SMALL_SIDE:
        drawn = torch.Generator().manual_seed(0)
        U, _, Vh = truncated_svd(D, rank, drawn)
        return Basis(U.contiguous() if left else None, Vh.contiguous() if right else None)
    wide = D.shape[0] <= D.shape[1]
    thin = (D if wide else D.T).to(torch.float64)
    # The eigenvectors of a small Gram matrix: no decomposition of the long side.
    short = torch.linalg.eigh(thin @ thin.T).eigenvectors.flip(1)[:, :rank]
    needs_long = right if wide else left
    # By QR, orthonormal also where nothing is left of D.
    long = torch.linalg.qr(thin.T @ short).Q if needs_long else short
    columns, rows = (short, long) if wide else (long, short)
    return Basis(
        columns.to(D.dtype).contiguous() if left else None,
        rows.T.to(D.dtype).contiguous() if right else None,
    )


class ProjectedAdamW(Optimizer):
    """GaLore's AdamW for the groups with `projected`, ordinary AdamW (ε outside of the bias correction) for the rest.

    The state of a parameter is plain tensors and numbers: `count`, its steps; `age`, those since its moments began;
    `left` and `right`, its basis; `first` and `second`, the moments, or their codes and scales in 8 bits.

    Args:
        groups: param groups; `projected` is False unless given.

    Attributes:
        refreshed: how many parameters got a new subspace in the last step.
        gradient_norm: of all gradients of the last step, where they were used in the backward pass.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], projection: Projection, *, lr: float, weight_decay: float = 0.0
    ) -> None:
        self.projection = projection
        self.refreshed, self.gradient_norm = 0, 0.0
        self._renewed, self._squares = 0, 0.0
        super().__init__(list(groups), {"lr": lr, "weight_decay": weight_decay, "projected": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update, of what the backward pass has left to be updated."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        self.refreshed, self.gradient_norm = self._renewed, math.sqrt(self._squares)
        self._renewed, self._squares = 0, 0.0
        return loss

    def update_in_backward(self) -> None:
        """From now on every parameter is updated as soon as a backward pass has its gradient, which is freed at once.

        The gradients of one step must come from one backward pass, and nobody can look at all of them: no accumulation,
        no clipping by their common norm, no averaging over devices.
        """
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_at_once, number))

    @torch.no_grad()
    def _update_at_once(self, number: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad))
        if not math.isfinite(norm):
            raise TrainingDiverged(
                f"The norm of a gradient is {norm}; the training stopped in the backward pass, before it was used.",
                hint="Take a lower learning rate, a warm-up or a higher precision, and look for odd rows in the data. "
                "A retry of the job goes on from the last checkpoint.",
            )
        self._squares += norm * norm
        # By its number: a state that is loaded makes new groups.
        self._update(parameter, self.param_groups[number])
        parameter.grad = None

    def load_state_dict(self, state_dict: Any) -> None:
        """As of any optimiser; codes, which it would make numbers of the parameters' kind, stay codes."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in _CODES.keys() & state.keys():
                state[name] = state[name].to(_CODES[name])

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        assert parameter.grad is not None
        D = parameter.grad.to(torch.float64 if parameter.dtype == torch.float64 else torch.float32)
        state = self.state[parameter]
        basis = None
        if group["projected"]:
            if "left" not in state and self.projection.deferred and not _has_directions(D):
                return
            basis = self._basis(state, D)
        Z = D if basis is None else basis.down(D)
        first, second = self._moments(state, Z)
        first.mul_(BETAS[0]).add_(Z, alpha=1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(Z, Z, value=1 - BETAS[1])
        state["count"] = state.get("count", 0) + 1
        state["age"] = age = state.get("age", 0) + 1
        length = group["lr"] * math.sqrt(1 - BETAS[1] ** age) / (1 - BETAS[0] ** age)
        update = first / second.sqrt().add_(EPSILON)
        self._keep(state, first, second, projected=basis is not None)
        if basis is not None:
            update = basis.up(update)
            length *= self.projection.scale
        parameter.add_(update.to(parameter.dtype), alpha=-length)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _basis(self, state: dict[str, Any], D: Tensor) -> Basis:
        old = Basis(state["left"], state["right"]) if "left" in state else None
        if old is not None and state.get("count", 0) % self.projection.interval:
            return old
        new = find_basis(D, self.projection.rank, *self.projection.projects(*D.shape))
        state["left"], state["right"] = new.left, new.right
        self._renewed += 1
        if old is None or self.projection.on_refresh == "keep":
            return new
        shape = new.down(D).shape
        first, second = self._stored(state, shape, D)
        if self.projection.on_refresh == "rotate":
            first = new.down(old.up(first))
        else:
            first, second = torch.zeros_like(first), torch.zeros_like(second)
            state["age"] = 0
        self._keep(state, first, second, projected=True)
        return new

    def _moments(self, state: dict[str, Any], Z: Tensor) -> tuple[Tensor, Tensor]:
        if "count" not in state:
            return torch.zeros_like(Z), torch.zeros_like(Z)
        return self._stored(state, Z.shape, Z)

    def _stored(self, state: dict[str, Any], shape: torch.Size, like: Tensor) -> tuple[Tensor, Tensor]:
        if "first_codes" not in state:
            return state["first"], state["second"]
        first = decode_signed(Blocks(state["first_codes"], state["first_scales"]), shape)
        second = decode_square(Blocks(state["second_codes"], state["second_scales"]), shape)
        return first.to(like.dtype), second.to(like.dtype)

    def _keep(self, state: dict[str, Any], first: Tensor, second: Tensor, *, projected: bool) -> None:
        if not (projected and self.projection.bits == 8 and first.numel() >= FEWEST):
            state["first"], state["second"] = first, second
            return
        for name, stored in (("first", encode_signed(first)), ("second", encode_square(second))):
            state[f"{name}_codes"], state[f"{name}_scales"] = stored.codes, stored.scales


def _has_directions(D: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(D) > _NOTHING * math.sqrt(D.numel()))


def state_bytes(optimizer: Optimizer) -> int:
    """What an optimiser keeps, measured: bytes of all tensors of its state."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
