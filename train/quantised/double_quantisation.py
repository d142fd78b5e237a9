"""Double quantisation of a matrix and back (arXiv:2311.12023, section 3.2; QLoRA's, with the smallest scale taken off).

N weights in the order of the rows are n·B1 blocks of B0. A block's scale s is its largest absolute value. With
t = s − min(s) ≥ 0, s1 the largest t of B1 blocks, and q1 = round(t·(2^b0 − 1)/s1), the scale in force is
ŝ = min(s) + q1·s1/(2^b0 − 1); a weight becomes the level v that is nearest to W/ŝ, and Q = v·ŝ.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from train.normal_float import levels, nearest
from train.normal_float import looked_up as levels_of
from train.quantised.bit_packing import looked_up, pack, packed_bytes, unpack
from train.quantised.block_format import BlockFormat

_CACHED, _AT_ONCE = 2**16, 2**24
"""Weights that are rounded at once: few enough for a CPU's cache, or for the memory of a GPU."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a matrix. `codes`: (n, B1) int32, q1; `second`: (n, 1) in the format's dtype; `offset`: ()."""

    codes: Tensor
    second: Tensor
    offset: Tensor

    def value(self, bits: int) -> Tensor:
        """ŝ, (n, B1) float32."""
        return _scale_values(self.codes, self.second, self.offset, bits)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix as it is stored.

    Attributes:
        codes: uint8, the packed codes of the weights.
        scale_q: uint8, the packed codes of the scales.
        scale2: (n,) in the format's dtype.
        offset: () float32.
    """

    codes: Tensor
    scale_q: Tensor
    scale2: Tensor
    offset: Tensor
    shape: tuple[int, int]
    form: BlockFormat

    @property
    def counted_bytes(self) -> int:
        """Of all but the offset: what the bits per weight count."""
        parts = (self.codes, self.scale_q, self.scale2)
        return sum(part.numel() * part.element_size() for part in parts)

    def identity(self) -> str:
        """SHA-256 (hex) of Q as it is stored, by which an adapter knows it again."""
        digest = hashlib.sha256(str((*self.shape, self.form.to_list())).encode())
        for part in (self.codes, self.scale_q, self.scale2, self.offset):
            digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def tensor_shapes(numel: int, form: BlockFormat) -> dict[str, tuple[int, ...]]:
    """Name → shape of what a matrix of so many entries is stored as."""
    blocks = numel // form.block
    return {
        "codes": (packed_bytes(numel, form.bits),),
        "scale_q": (packed_bytes(blocks, form.scale_bits),),
        "scale2": (blocks // form.scales,),
        "offset": (),
    }


def scales_of(weight: Tensor, form: BlockFormat) -> Scales:
    """The scales of `weight`, any shape, float32 and finite."""
    s = weight.reshape(-1, form.scales, form.block).abs().amax(dim=2)
    offset = s.min()
    t = s - offset
    second = t.amax(dim=1, keepdim=True).to(DTYPES[form.scale_dtype])
    divisor = second.to(torch.float32)
    top = 2**form.scale_bits - 1
    # s1 is 0 where all scales are the smallest one, or where t is below what the dtype can hold
    codes = torch.where(divisor > 0, t * top / torch.where(divisor > 0, divisor, 1), 0).round().clamp(0, top)
    return Scales(codes.to(torch.int32), second, offset)


def codes_of(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest level of every weight, by the scale in force: (n·B1, B0) int32."""
    s = scales.reshape(-1, 1)
    return nearest(weight.reshape(len(s), -1) / torch.where(s == 0, 1, s), bits)


def rounded(weight: Tensor, form: BlockFormat) -> Tensor:
    """`unpacked(packed(weight))` without the packing.

    Args:
        weight: of any shape whose blocks are whole; float32 and finite.
    """
    s = scales_of(weight, form).value(form.scale_bits).reshape(-1, 1)
    blocks = weight.reshape(len(s), -1)
    found = torch.empty_like(blocks)
    step = max(1, (_CACHED if weight.device.type == "cpu" else _AT_ONCE) // form.block)
    for begin in range(0, len(s), step):
        part = slice(begin, begin + step)
        torch.mul(levels_of(codes_of(blocks[part], s[part], form.bits), form.bits), s[part], out=found[part])
    return found.view(weight.shape)


def packed(weight: Tensor, form: BlockFormat) -> PackedMatrix:
    """(d_out, d_in) float32 and finite → codes."""
    d_out, d_in = weight.shape
    if not form.fits(weight.numel()):
        raise ValueError(f"{d_out}×{d_in} is no multiple of {form.block}·{form.scales}")
    scales = scales_of(weight, form)
    codes = codes_of(weight, scales.value(form.scale_bits), form.bits)
    return PackedMatrix(
        codes=pack(codes, form.bits),
        scale_q=pack(scales.codes, form.scale_bits),
        scale2=scales.second.reshape(-1),
        offset=scales.offset,
        shape=(d_out, d_in),
        form=form,
    )


def unpacked(matrix: PackedMatrix) -> Tensor:
    """Q, (d_out, d_in) float32."""
    numel = matrix.shape[0] * matrix.shape[1]
    form = matrix.form
    blocks = numel // form.block
    codes = unpack(matrix.scale_q, form.scale_bits, blocks).view(-1, form.scales).to(torch.int32)
    s = _scale_values(codes, matrix.scale2.view(-1, 1), matrix.offset, form.scale_bits)
    table = levels(form.bits).to(matrix.codes.device)
    values = looked_up(matrix.codes, form.bits, numel, table).view(-1, form.block)
    found: Tensor = values.mul_(s.view(-1, 1)).view(matrix.shape)
    return found


def _scale_values(codes: Tensor, second: Tensor, offset: Tensor, bits: int) -> Tensor:
    found: Tensor = offset + codes.to(torch.float32) * second.to(torch.float32) / (2**bits - 1)
    return found
