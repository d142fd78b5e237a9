"""A low-rank pair as a writer wants it: of one module, or of several that another implementation has fused.

Here is what it consists of, without a number; `artifacts.pair_numbers` computes it.

The pair of a fused projection has the blocks' rows one below the other. Blocks with the same A (they were one tensor
once) share it; otherwise the A are stacked and B is block-diagonal, so that nothing is lost and the ranks add up.
Blocks that the adapter does not have are rows of zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from artifacts.float_dtypes import holds
from artifacts.manifest import LoraModule


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of a pair: those of a module, or zeros."""

    rows: int
    module: LoraModule | None


@dataclass(frozen=True)
class Pair:
    """Two tensors to be written, A: (rank, *a_tail) and B: (d_out, rank, *b_tail).

    Attributes:
        alpha_name: the tensor that holds alpha; "" where alpha stands elsewhere.
        swap: the two halves of the rows change places.
        told: what the format multiplies B·A by; the rest of the scaling goes into B. None: what the modules have.
        limit: the largest rank of the result; None keeps all.
        head_rows: of one head, whose rows are written interleaved: the first of both halves, then the second …; 0
            leaves all rows where they are.
        a_turned: A is written as (*a_tail, rank).
    """

    a_name: str
    b_name: str
    blocks: tuple[Block, ...]
    a_tail: tuple[int, ...]
    b_tail: tuple[int, ...] = ()
    alpha_name: str = ""
    swap: bool = False
    told: float | None = None
    limit: int | None = None
    head_rows: int = 0
    a_turned: bool = False

    @cached_property
    def modules(self) -> tuple[LoraModule, ...]:
        return tuple(block.module for block in self.blocks if block.module is not None)

    @cached_property
    def shared(self) -> bool:
        """Whether all blocks have one A."""
        return len({(item.a_key, item.rank_span, item.mid_key) for item in self.modules}) == 1

    @cached_property
    def full_rank(self) -> int:
        return self.modules[0].rank if self.shared else sum(module.rank for module in self.modules)

    @property
    def truncated(self) -> bool:
        return self.limit is not None and self.limit < self.full_rank

    @property
    def rank(self) -> int:
        return min(self.full_rank, self.limit or self.full_rank)

    @property
    def d_out(self) -> int:
        return sum(block.rows for block in self.blocks)

    @property
    def common(self) -> float:
        """The scaling of the first module, which B's blocks of other scalings are brought to."""
        return next((module.scaling for module in self.modules if module.scaling), 1.0)

    @property
    def scaling(self) -> float:
        """What B·A is to be multiplied by, as it is written."""
        if self.told is not None:
            return self.told
        return 1.0 if self.truncated else self.common

    @property
    def alpha(self) -> float:
        return self.scaling * self.rank

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B."""
        a = (*self.a_tail, self.rank) if self.a_turned else (self.rank, *self.a_tail)
        return a, (self.d_out, self.rank, *self.b_tail)

    def exact(self, dtype: str) -> bool:
        """Whether nothing is rounded."""
        factors = {module.scaling / self.scaling for module in self.modules}
        plain = factors == {1.0} or (dtype == "F32" and all(_is_power_of_two(factor) for factor in factors))
        fits = all(holds(dtype, module.dtype) and module.mid_key is None for module in self.modules)
        return plain and fits and not self.truncated

    def cost(self) -> float:
        """Operations of cutting the rank, roughly."""
        r = self.full_rank
        return 8.0 * (self.d_out + math.prod(self.a_tail)) * r * r + 20.0 * r**3 if self.truncated else 0.0


def _is_power_of_two(value: float) -> bool:
    return value != 0 and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5
