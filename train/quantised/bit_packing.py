"""Codes of 2, 3, 4 or 8 bits in bytes, little-endian: code n has the bits from n·b on, and none is lost between two."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_TOGETHER = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""Bits → (codes, bytes) of the smallest group that ends with a byte."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) integers below 2^bits → (⌈n·bits/8⌉,) uint8."""
    count, size = _TOGETHER[bits]
    flat = codes.reshape(-1).to(torch.uint8)
    if bits == 8:
        return flat.clone()
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % count)).view(-1, count)
    if bits == 3:
        wide = groups.to(torch.int32)
        word = sum((wide[:, place] << (3 * place) for place in range(8)), torch.zeros_like(wide[:, 0]))
        found = torch.stack([(word >> (8 * place)) & 255 for place in range(size)], dim=1).to(torch.uint8)
    else:
        found = groups[:, 0].clone()
        for place in range(1, count):
            found |= groups[:, place] << (bits * place)
    return found.reshape(-1)[: packed_bytes(len(flat), bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack` was given: (count,) uint8."""
    if bits == 8:
        return packed[:count]
    if bits == 3:
        word = _words(packed)
        found = torch.stack([(word >> (3 * place)) & 7 for place in range(8)], dim=1).to(torch.uint8)
    else:
        mask = 2**bits - 1
        found = torch.stack([(packed >> (bits * place)) & mask for place in range(8 // bits)], dim=1)
    return found.reshape(-1)[:count]


def looked_up(packed: Tensor, bits: int, count: int, table: Tensor) -> Tensor:
    """`table[unpack(packed, bits, count)]`, several codes with each look-up.

    Args:
        table: (2^bits,), of any dtype.
    """
    wide = _wide_table(bits, table)
    if bits == 3:
        word = _words(packed)
        places = torch.stack([word & 4095, word >> 12], dim=1).reshape(-1)
    else:
        places = packed.to(torch.int32)
    return wide.index_select(0, places).reshape(-1)[:count]


def _words(packed: Tensor) -> Tensor:
    """Three bytes each, with eight codes of 3 bits, as int32."""
    wide = torch.nn.functional.pad(packed, (0, -len(packed) % 3)).view(-1, 3).to(torch.int32)
    return wide[:, 0] | (wide[:, 1] << 8) | (wide[:, 2] << 16)


def _wide_table(bits: int, table: Tensor) -> Tensor:
    """(2^w, w/bits): the values of all codes in w bits; w is 12 for 3 bits, else 8."""
    return table[_wide_codes(bits).to(table.device)]


@lru_cache(maxsize=8)
def _wide_codes(bits: int) -> Tensor:
    width = 12 if bits == 3 else 8
    every = torch.arange(2**width)
    return torch.stack([(every >> (bits * place)) & (2**bits - 1) for place in range(width // bits)], dim=1)
