"""The layer ΔW = s·B·R·A, and what the methods have in common that train one or all of its factors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from artifacts.errors import FieldError, FileBroken, RequestInvalid
from train.adapted_layers import AdaptedLinear, LowRank
from train.methods.own_adapter import OwnMethod
from train.methods.peft_adapter import WEIGHTS
from train.options.three_factor import ThreeFactorOptions
from train.protocol import MethodContext

FACTORS = ("A", "R", "B")
MIDDLE, ALL = frozenset({"R"}), frozenset(FACTORS)

Options = TypeVar("Options", bound=ThreeFactorOptions)


@dataclass(frozen=True, slots=True)
class ThreeFactors:
    """A (r×d_in), R (r×r) and B (d_out×r), of one precision."""

    A: Tensor
    R: Tensor
    B: Tensor

    def norm(self) -> float:
        """‖B·R·A‖ (Frobenius), from products of r×r."""
        left, right = self.B.T @ self.B, self.A @ self.A.T
        return float((left @ self.R @ right * self.R).sum().clamp(min=0).sqrt())

    def balanced(self) -> tuple[Tensor, Tensor]:
        """A' (r×d_in) and B' (d_out×r) with B'·A' = B·R·A, R shared out between both by its SVD."""
        u, s, vt = torch.linalg.svd(self.R.double())
        root = s.sqrt()
        return (root[:, None] * vt).to(self.A) @ self.A, self.B @ (u * root).to(self.B)


class ThreeFactorLinear(AdaptedLinear):
    """y = W x + b + s·B·R·A·x."""

    def __init__(
        self,
        base: nn.Module,
        start: ThreeFactors,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        trained: frozenset[str] = ALL,
    ) -> None:
        """Args:
        start: is copied: nothing shares memory with it.
        trained: which of A, R and B have a gradient.
        """
        super().__init__(base)
        self.scaling, self.dropout, self.trained = scaling, dropout, trained
        self.lora_A = self._parameter(start.A, "A" in trained)
        self.lora_R = self._parameter(start.R, "R" in trained)
        self.lora_B = self._parameter(start.B, "B" in trained)
        self.changes_base = False

    def adapter(self, x: Tensor) -> Tensor:
        inner = linear(linear(dropout(x, self.dropout, self.training), self.lora_A), self.lora_R)
        return linear(inner if self.scaling == 1 else inner * self.scaling, self.lora_B)

    @property
    def factors(self) -> ThreeFactors:
        """As they are now."""
        return ThreeFactors(self.lora_A.detach(), self.lora_R.detach(), self.lora_B.detach())

    @property
    def initial(self) -> ThreeFactors:
        """As they were when `take_out` was called."""
        return ThreeFactors(
            *(getattr(self, f"initial_{name}" if name in self.trained else f"lora_{name}").detach() for name in FACTORS)
        )

    @torch.no_grad()
    def take_out(self) -> None:
        """W − s·B·R·A in the place of W, whose own memory stays as it is; the factors of now become `initial`."""
        now, weight = self.factors, self.weight
        for name in sorted(self.trained):
            self.register_buffer(f"initial_{name}", getattr(now, name).clone())
        left = (weight.to(now.A.dtype) - self.scaling * (now.B @ (now.R @ now.A))).to(weight.dtype)
        if self.fan_in_fan_out:
            left = left.T.contiguous()
        self.base.weight = nn.Parameter(left, requires_grad=False)
        self.changes_base = True

    def low_rank(self) -> LowRank:
        """The change of the untouched W since before `take_out`, or s·B·R·A if that was not called; exact.

        The rank is r, and 2r if W was changed and the outer factors have moved (arXiv:2502.14482 trains both).
        """
        now = self.factors
        if not self.changes_base:
            return LowRank(*now.balanced(), self.scaling)
        first = self.initial
        if self.trained == MIDDLE:
            return LowRank(*ThreeFactors(now.A, now.R - first.R, now.B).balanced(), self.scaling)
        (a, b), (a_first, b_first) = now.balanced(), first.balanced()
        return LowRank(torch.cat([a, a_first]), torch.cat([b, -b_first], dim=1), self.scaling)

    def _parameter(self, start: Tensor, trained: bool) -> nn.Parameter:
        copied = torch.empty(start.shape, dtype=start.dtype, device=self.weight.device).copy_(start)
        return nn.Parameter(copied, requires_grad=trained)


class ThreeFactorMethod(OwnMethod[Options]):
    """Every targeted layer becomes a `ThreeFactorLinear` that begins where `start` says."""

    trained: ClassVar[frozenset[str]] = MIDDLE

    @abstractmethod
    def start(self, path: str, weight: Tensor) -> ThreeFactors:
        """The first factors, float32, for W (d_out×d_in, float32); asked once per layer, in the order of the paths."""

    @property
    def changes_base(self) -> bool:
        """Whether W loses in memory what the factors begin with."""
        return False

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        self.told: dict[str, Any] = {}
        self.generator = torch.Generator().manual_seed(context.seed)
        # Computing the start again costs time, and could give other values on another machine.
        self._saved = None if context.checkpoint is None else load_file(context.checkpoint / WEIGHTS)
        prepared = super().prepare(model, context)
        self._saved = None
        return prepared

    def layer(self, path: str, base: nn.Module) -> AdaptedLinear:
        weight = _weight(path, base)
        start = self._from_checkpoint(path) if self._saved is not None else self.start(path, weight)
        layer = ThreeFactorLinear(
            base, start, scaling=self.options.scaling, dropout=self.options.dropout, trained=self.trained
        )
        if self.changes_base:
            layer.take_out()
        return layer

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        del path
        assert isinstance(layer, ThreeFactorLinear)
        return layer.low_rank()

    def state(self) -> dict[str, Any]:
        return {"told": self.told}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.told = dict(state["told"])

    def report(self, model: nn.Module) -> dict[str, Any]:
        del model
        return self.told

    def _from_checkpoint(self, path: str) -> ThreeFactors:
        """The factors of the checkpoint; those before training where W depends on them."""
        assert self._saved is not None
        found = []
        for name in FACTORS:
            key = f"{path}.initial_{name}"
            value = self._saved.get(key if key in self._saved else f"{path}.lora_{name}")
            if value is None:
                raise FileBroken(f"The checkpoint does not hold the adapter that is trained: {path}.lora_{name}.")
            found.append(value)
        return ThreeFactors(*found)


def _weight(path: str, base: nn.Module) -> Tensor:
    """W of a linear layer, (d_out, d_in) float32. Raises RequestInvalid for any other or a quantised one."""
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear | Conv1D) or weight is None or not weight.is_floating_point():
        problem = f"{path} is no linear layer in full precision ({type(base).__name__})"
        raise RequestInvalid(f"{problem}.", errors=[FieldError("/parameters/target_modules", problem)])
    found: Tensor = weight.detach() if isinstance(base, nn.Linear) else weight.detach().T
    return found.to(torch.float32)
