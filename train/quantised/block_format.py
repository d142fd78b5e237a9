"""How a weight matrix is stored in a few bits: NormalFloat codes in blocks, whose scales are quantised again.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Literal, Self

ScaleDtype = Literal["bfloat16", "float16", "float32"]

CODEBOOK = "nf-v1"
"""The levels of `train.normal_float`; another table would be another name."""
WIDTHS = (2, 3, 4, 8)
BLOCKS = (16, 32, 64)
SCALE_BLOCKS = (16, 64, 256)
DTYPE_BITS: Mapping[ScaleDtype, int] = {"bfloat16": 16, "float16": 16, "float32": 32}
DTYPE_NAMES: Mapping[ScaleDtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""What safetensors calls them."""


@dataclass(frozen=True, slots=True, order=True)
class BlockFormat:
    """One setting of the double quantisation; arXiv:2311.12023, section 3.2.

    Attributes:
        bits: b, of the code of a weight.
        scale_bits: b0, of the code of a block's scale.
        scale_dtype: b1, of the scale of a block of scales.
        block: B0, weights that share a scale, in the order of the rows.
        scales: B1, scales that share a scale of their own.
    """

    bits: int
    scale_bits: int
    scale_dtype: ScaleDtype
    block: int
    scales: int

    @property
    def bits_per_weight(self) -> float:
        """b + b0/B0 + b1/(B0·B1). The one number of 32 bits that a matrix has beside is not counted."""
        return self.bits + self.scale_bits / self.block + DTYPE_BITS[self.scale_dtype] / (self.block * self.scales)

    def bits_of(self, numel: int) -> int:
        """Bits of a matrix of so many entries, exactly."""
        blocks = numel // self.block
        return numel * self.bits + blocks * self.scale_bits + blocks // self.scales * DTYPE_BITS[self.scale_dtype]

    def fits(self, numel: int) -> bool:
        """Whether a matrix of so many entries has only whole blocks."""
        return numel % (self.block * self.scales) == 0

    def to_list(self) -> list[Any]:
        """[b, b0, b1, B0, B1], as JSON has it."""
        return [self.bits, self.scale_bits, self.scale_dtype, self.block, self.scales]

    @classmethod
    def of(cls, stored: Iterable[Any]) -> Self:
        """What `to_list` gave.

        Raises:
            ValueError: it is no format.
        """
        found = list(stored)
        sizes = [*found[:2], *found[3:]]
        whole = len(found) == 5 and all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
        if not whole or found[0] not in WIDTHS or found[1] not in WIDTHS or found[2] not in DTYPE_BITS:
            raise ValueError(f"{found[:6]!r} is no format [bits, scale_bits, scale_dtype, block, scales]")
        if not (1 <= found[3] <= 2**16 and 1 <= found[4] <= 2**16):
            raise ValueError(f"{found!r} has blocks of another size than 1 to 65536")
        return cls(*found)


PRESETS: Mapping[str, tuple[BlockFormat, ...]] = {
    name: tuple(BlockFormat(bits, 8, "float32", 64, scales) for scales in reversed(SCALE_BLOCKS))
    for name, bits in (("nf3", 3), ("nf4", 4))
}
"""Each matrix gets the first whose blocks are whole in it; in large ones that is always the first."""


def grid(
    bits: Iterable[int] = WIDTHS,
    scale_bits: Iterable[int] = WIDTHS,
    scale_dtypes: Iterable[ScaleDtype] = ("bfloat16",),
    blocks: Iterable[int] = BLOCKS,
    scales: Iterable[int] = SCALE_BLOCKS,
) -> list[BlockFormat]:
    """Every combination, the fewest bits first. The 16 bits of bfloat16 and float16 cost the same, and the precision
    of the second scale hardly changes the error: by default 144 of the 432 of arXiv:2311.12023."""
    every = [BlockFormat(*found) for found in product(bits, scale_bits, scale_dtypes, blocks, scales)]
    return sorted(every, key=lambda item: (item.bits_per_weight, item))


def first_that_fits(numel: int, forms: Iterable[BlockFormat]) -> BlockFormat:
    """For a matrix of so many entries, which one of them fits."""
    return next(form for form in forms if form.fits(numel))


def numel_of(shape: Iterable[int]) -> int:
    """Entries of a matrix."""
    return prod(shape)
