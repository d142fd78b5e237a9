"""A linear layer whose weight stays packed: it is unpacked for each pass, and again for the pass back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from train.quantised.block_format import BlockFormat
from train.quantised.double_quantisation import DTYPES, PackedMatrix, tensor_shapes, unpacked


class PackedLinear(nn.Module):
    """y = Q x + b, where Q is kept as codes and scales. No gradient goes to Q.

    Attributes:
        codes, scale_q, scale2, offset: see `train.quantised.double_quantisation.PackedMatrix`.
        bias: (d_out,), frozen; or None.
        stored_path: what the files call the layer; classes with a head put a component before it.
    """

    codes: Tensor
    scale_q: Tensor
    scale2: Tensor
    offset: Tensor

    def __init__(
        self, d_out: int, d_in: int, form: BlockFormat, *, bias: Tensor | None = None, stored_path: str = ""
    ) -> None:
        super().__init__()
        self.stored_path = stored_path
        self.out_features, self.in_features, self.form = d_out, d_in, form
        shapes = tensor_shapes(d_out * d_in, form)
        dtypes = {"scale2": DTYPES[form.scale_dtype], "offset": torch.float32}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtypes.get(name, torch.uint8)))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> PackedMatrix:
        """Q as it is stored."""
        return PackedMatrix(
            self.codes, self.scale_q, self.scale2, self.offset, (self.out_features, self.in_features), self.form
        )

    @property
    def weight(self) -> Tensor:
        """Q, (d_out, d_in) float32, unpacked anew at every call."""
        return unpacked(self.matrix)

    def identity(self) -> str:
        """SHA-256 (hex) of Q as it is stored, by which an adapter knows it again."""
        return self.matrix.identity()

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ordinary layer with this weight. `dtype`: unset, float32."""
        made = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight = nn.Parameter(self.weight.to(dtype or torch.float32), requires_grad=False)
        if self.bias is not None:
            made.bias = nn.Parameter(self.bias.detach().to(dtype or torch.float32), requires_grad=False)
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """Moved to another device, never cast: the scales are what they are."""
        kept = {name: buffer.dtype for name, buffer in self.named_buffers()}
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if self.get_buffer(name).dtype != kept[name]:
                setattr(self, name, buffer.to(self.codes.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) → (…, d_out), in the dtype of x."""
        y = cast("Tensor", _Product.apply(x, self))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x Qᵀ that keeps neither x, which only a gradient of Q would need, nor Q."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradient @ ctx.layer.weight.to(gradient.dtype), None
