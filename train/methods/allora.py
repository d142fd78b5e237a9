"""ALLoRA (arXiv:2410.09692): LoRA whose gradients are multiplied, row by row of ΔW, by a factor that falls as the row
grows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from train.adapted_layers import AdaptedLinear, LowRank
from train.methods.own_adapter import OwnMethod
from train.options.allora import AlloraOptions
from train.protocol import MethodContext

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from train.settings import TrainingSettings


@torch.no_grad()
def row_factors(A: Tensor, B: Tensor, inverse_eta_sq: float) -> Tensor:
    """s_i = 1/√(‖(B·A)_i‖₂ + 1/η²), §4.2 of the paper: the norm under the root is not squared.

    The norms come from ‖(B·A)_i‖² = b_i·(A·Aᵀ)·b_iᵀ, so that B·A is never formed.

    Args:
        A: (r, d_in).
        B: (d_out, r).

    Returns:
        (d_out,), in the precision of the factors; η where the row is 0.
    """
    with torch.autocast(A.device.type, enabled=False):
        squares: Tensor = torch.linalg.vecdot(B @ (A @ A.T), B)
    # Rounding may leave a little less than 0.
    return squares.clamp_(min=0).sqrt_().add_(inverse_eta_sq).rsqrt_()


class RowScaledProduct(torch.autograd.Function):
    """y = B·A·x, whose gradients for A and B, and only those, see S·g in the place of g (appendix F).

    With G = Σ g·xᵀ over all tokens: ∂B = S·G·Aᵀ, ∂A = Bᵀ·S·G, ∂x = Aᵀ·Bᵀ·g. S·g itself is not formed: the rows of
    G·Aᵀ, and of B, are multiplied instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, s: Tensor, scale_B: bool, dtype: torch.dtype) -> Tensor:
        """(…, d_in) → (…, d_out) in `dtype`; A (r, d_in), B (d_out, r), s (d_out,).

        Without `scale_B`, ∂B is that of a plain LoRA.
        """
        with torch.autocast(x.device.type, enabled=False):
            flat, factor_A, factor_B = x.reshape(-1, x.shape[-1]).to(dtype), A.to(dtype), B.to(dtype)
            inner = flat @ factor_A.T
            y = inner @ factor_B.T
        ctx.save_for_backward(flat, inner, factor_A, factor_B, s)
        ctx.shape, ctx.scale_B = x.shape, scale_B
        ctx.dtypes = x.dtype, A.dtype, B.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        flat, inner, A, B, s = ctx.saved_tensors
        of_x, of_A, of_B = ctx.dtypes
        d_x = d_A = d_B = None
        with torch.autocast(g.device.type, enabled=False):
            rows = g.reshape(-1, g.shape[-1]).to(B.dtype)
            if ctx.needs_input_grad[0]:
                d_x = ((rows @ B) @ A).view(ctx.shape).to(of_x)
            if ctx.needs_input_grad[1]:
                d_A = ((rows @ (B * s.to(B.dtype)[:, None])).T @ flat).to(of_A)
            if ctx.needs_input_grad[2]:
                d_B = (rows.T @ inner).to(of_B)
                if ctx.scale_B:
                    d_B *= s[:, None]
        return d_x, d_A, d_B, None, None, None


class AlloraLinear(AdaptedLinear):
    """y = W x + b + B·A·x, without dropout and scaling.

    Attributes:
        lora_A: (r, d_in), starts as a LoRA's.
        lora_B: (d_out, r), starts at 0.
        row_factor: s of the running step, (d_out,); no part of a checkpoint, for it follows from the factors.
    """

    def __init__(self, base: nn.Module, rank: int, inverse_eta_sq: float, *, scale_B: bool = True) -> None:
        super().__init__(base)
        self.inverse_eta_sq, self.scale_B = inverse_eta_sq, scale_B
        # Drawn on the CPU, so that every device starts at the same numbers.
        start = nn.init.kaiming_uniform_(torch.empty(rank, self.d_in), a=math.sqrt(5))
        self.lora_A = nn.Parameter(start.to(self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, rank, device=self.weight.device))
        self.renew_row_factor()

    def renew_row_factor(self) -> None:
        """Compute s from the present factors: once before each step of the optimiser."""
        self.row_factor = row_factors(self.lora_A.detach(), self.lora_B.detach(), self.inverse_eta_sq)

    def adapter(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.lora_A.dtype
        y: Tensor = RowScaledProduct.apply(  # type: ignore[no-untyped-call]
            x, self.lora_A, self.lora_B, self.row_factor, self.scale_B, dtype
        )
        return y


class Allora(OwnMethod[AlloraOptions]):
    """The factors are computed from A and B as they are before a step, and are constants in it."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        prepared = super().prepare(model, context)
        self.mean_factor = 0.0
        return prepared

    def layer(self, path: str, base: nn.Module) -> AlloraLinear:
        options = self.options
        return AlloraLinear(base, options.rank, options.inverse_eta_sq, scale_B=options.placement == "gradient")

    def begin(self, path: str, layer: AdaptedLinear, start: LowRank) -> None:
        assert isinstance(layer, AlloraLinear)
        with torch.no_grad():
            layer.lora_A.copy_(start.A)
            layer.lora_B.copy_(start.scaling * start.B)

    def factors(self, path: str, layer: AdaptedLinear) -> LowRank:
        assert isinstance(layer, AlloraLinear)
        return LowRank(layer.lora_A, layer.lora_B, 1.0)

    def optimizer(self, model: nn.Module, settings: TrainingSettings) -> Optimizer | None:
        if self.options.placement == "gradient":
            return None
        whole = [value for path in self.context.whole for value in model.get_submodule(path).parameters()]
        return row_scaled_optimizer(self._own_layers(), whole, settings)

    def before_step(self, model: nn.Module, step: int) -> None:
        layers = self._own_layers()
        for layer in layers:
            layer.renew_row_factor()
        rows = sum(layer.d_out for layer in layers)
        self.mean_factor = float(torch.stack([layer.row_factor.sum() for layer in layers]).sum()) / rows

    def metrics(self) -> dict[str, float]:
        """The mean of s over all rows of all layers in the step: η at the start, less as the rows grow."""
        return {"mean_row_factor": self.mean_factor}

    def _own_layers(self) -> list[AlloraLinear]:
        return [layer for layer in self.layers.values() if isinstance(layer, AlloraLinear)]


def row_scaled_optimizer(
    layers: list[AlloraLinear], whole: list[nn.Parameter], settings: TrainingSettings
) -> Optimizer:
    """The settings' optimiser, of whose update of B row i is taken s_i times and of A rms(s) times.

    The decay of the weights is not multiplied. The paper gives no rule for A: rms(s) is the factor that keeps the mean
    square of the two updates in proportion.

    Args:
        whole: parameters that are trained as they are; as usual their vectors do not decay.
    """
    groups: list[dict[str, Any]] = [
        {"params": [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]},
        {"params": [value for value in whole if value.ndim > 1]},
        {"params": [value for value in whole if value.ndim <= 1], "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    made: Optimizer = kind(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    update = _ScaledUpdate(layers)
    made.register_step_pre_hook(update.before)
    made.register_step_post_hook(update.after)
    return made


class _ScaledUpdate:
    """Lets an optimiser step from 0: what it leaves in a factor is then its update alone, with no decay in it."""

    def __init__(self, layers: list[AlloraLinear]) -> None:
        self._layers = layers
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def before(self, *_: Any) -> None:
        factors = self._factors()
        self._kept = [factor.detach().clone() for factor in factors]
        for factor in factors:
            factor.zero_()

    @torch.no_grad()
    def after(self, optimizer: Optimizer, *_: Any) -> None:
        group = optimizer.param_groups[0]
        kept = 1.0 - float(group["lr"]) * float(group["weight_decay"])
        for factor, value, share in zip(self._factors(), self._kept, self._shares(), strict=True):
            factor.mul_(share).add_(value, alpha=kept)
        self._kept = []

    def _factors(self) -> list[nn.Parameter]:
        return [layer.lora_A for layer in self._layers] + [layer.lora_B for layer in self._layers]

    def _shares(self) -> list[Tensor]:
        factors = [layer.row_factor for layer in self._layers]
        return [s.square().mean().sqrt() for s in factors] + [s[:, None] for s in factors]
