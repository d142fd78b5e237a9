"""Adam's two moments in 8 bits, block by block, for optimisers that keep them so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from train.projection import BLOCK

_SIGNED, _UNSIGNED = 127, 255


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tensor in 8 bits.

    Attributes:
        codes: (blocks, 256), int8 or uint8; the last block is filled up with zeros.
        scales: (blocks, 1) float32, the value of the largest code.
    """

    codes: Tensor
    scales: Tensor


def encode_signed(value: Tensor) -> Blocks:
    """Linear codes from -127 to 127; the error of an entry is at most absmax/254 of its block."""
    blocks, scales = _in_blocks(value)
    codes = torch.round(blocks * (_SIGNED / _positive(scales)))
    return Blocks(codes.to(torch.int8), scales)


def decode_signed(stored: Blocks, shape: torch.Size) -> Tensor:
    """What `encode_signed` was given, (shape) float32."""
    return _flat(stored.codes.to(torch.float32) * (stored.scales / _SIGNED), shape)


def encode_square(value: Tensor) -> Blocks:
    """Linear codes of the root of a tensor that is nowhere negative.

    Squares span twice the magnitudes of their roots: linear codes of the squares themselves would make most of them 0,
    and Adam divides by them. For the same reason nothing but 0 gets the code 0.
    """
    blocks, scales = _in_blocks(value.sqrt())
    codes = torch.round(blocks * (_UNSIGNED / _positive(scales)))
    return Blocks(torch.where(blocks > 0, codes.clamp(min=1), codes).to(torch.uint8), scales)


def decode_square(stored: Blocks, shape: torch.Size) -> Tensor:
    """What `encode_square` was given, (shape) float32."""
    return _flat((stored.codes.to(torch.float32) * (stored.scales / _UNSIGNED)).square_(), shape)


def _in_blocks(value: Tensor) -> tuple[Tensor, Tensor]:
    flat = value.to(torch.float32).reshape(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    return blocks, blocks.abs().amax(1, keepdim=True)


def _positive(scales: Tensor) -> Tensor:
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _flat(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.reshape(-1)[: shape.numel()].view(shape)
