"""How the gradients of a training are projected, and what an optimiser then keeps. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sides = Literal["std", "reverse_std", "left", "right", "full"]
OnRefresh = Literal["keep", "rotate", "reset"]
Bits = Literal[8, 32]

BLOCK = 256
"""Entries of a tensor in 8 bits that share a scale."""
FEWEST = 4096
"""A tensor of fewer entries stays in float32, as in bitsandbytes: in 8 bits it would save next to nothing."""
_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Projection:
    """How the gradient D (rows×columns) of a parameter is projected.

    Attributes:
        rank: R, of the subspace; a smaller side of the gradient limits it.
        interval: T, steps from one subspace to the next.
        scale: factor of the projected update.
        sides: std projects the shorter side of D, reverse_std the longer one, left its columns and right its rows (by
            the left and the right singular vectors), full both.
        bits: 8 keeps moments of at least 4096 entries in 8 bits.
        on_refresh: what becomes of the moments in a new subspace: keep their numbers, rotate the first one into it, or
            begin both at 0.
        deferred: the first subspace of a parameter waits for a gradient that is not 0; until then it stands still.
    """

    rank: int
    interval: int
    scale: float = 1.0
    sides: Sides = "std"
    bits: Bits = 32
    on_refresh: OnRefresh = "keep"
    deferred: bool = True

    def projects(self, rows: int, columns: int) -> tuple[bool, bool]:
        """Whether there is a left, and whether there is a right basis for D."""
        if self.sides == "full":
            return True, True
        left = {"std": rows < columns, "reverse_std": rows >= columns, "left": True, "right": False}[self.sides]
        return left, not left

    def in_8_bits(self, rows: int, columns: int) -> bool:
        """Whether the moments of a parameter are kept in 8 bits."""
        return self.bits == 8 and self._entries(rows, columns) >= FEWEST

    def state_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the bases and of both moments of a parameter of rows×columns."""
        rank = min(self.rank, rows, columns)
        left, right = self.projects(rows, columns)
        bases = (rows * rank if left else 0) + (rank * columns if right else 0)
        entries = self._entries(rows, columns)
        if not self.in_8_bits(rows, columns):
            return _FLOAT32_BYTES * (bases + 2 * entries)
        blocks = -(-entries // BLOCK)
        return _FLOAT32_BYTES * bases + 2 * blocks * (BLOCK + _FLOAT32_BYTES)

    def _entries(self, rows: int, columns: int) -> int:
        rank = min(self.rank, rows, columns)
        left, right = self.projects(rows, columns)
        return (rank if left else rows) * (rank if right else columns)
