"""The sides and the rank of LoHa's and LoKr's forms, found from the shapes of their tensors before any is multiplied.

Products of small tensors can be of any size, and whoever sends an adapter chooses them: what does not fit together, or
would not fit into memory, is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from artifacts.errors import FileBroken, MergeRefused
from merge.convertible import MAX_FORM_BYTES, MAX_FORM_RANK, MAX_FORM_SIDE

Shape = tuple[int, ...]


class FormSize(NamedTuple):
    """Of B·A = ΔW: B is (d_out, rank), A is (rank, d_in). Of a convolution d_in = c_in·kh·kw."""

    d_out: int
    d_in: int
    rank: int

    @property
    def bytes(self) -> int:
        """Of A and B in float32."""
        return 4 * self.rank * (self.d_out + self.d_in)


def form_size(path: str, kind: str, shapes: Mapping[str, Shape]) -> FormSize:
    """What `artifacts.low_rank_forms` makes of the tensors of a module.

    Args:
        kind: "loha" or "lokr".
        shapes: by role; of a convolution as PEFT and LyCORIS store them, with or without cores.

    Raises:
        FileBroken: tensors are missing, or their shapes do not fit each other.
        MergeRefused: the form is larger than is worked with.
    """
    if kind == "loha":
        one, two = (
            _product(path, shapes, (f"hada_w{n}_a", f"hada_w{n}_b"), f"hada_t{n}", whole=None) for n in ("1", "2")
        )
        if one[:2] != two[:2]:
            raise FileBroken(f"{path}: its two products are {one[0]}×{one[1]} and {two[0]}×{two[1]}.")
        size = FormSize(*one[:2], one.rank * two.rank)
    else:
        one, two = (
            _product(path, shapes, (f"lokr_w{n}_a", f"lokr_w{n}_b"), "lokr_t2" if n == "2" else None, f"lokr_w{n}")
            for n in ("1", "2")
        )
        ranks = [min(part) for part in (one, two)]  # what is wider than its sides becomes the matrix itself
        size = FormSize(one.d_out * two.d_out, one.d_in * two.d_in, ranks[0] * ranks[1])
    _check(path, size)
    return size


def _product(
    path: str, shapes: Mapping[str, Shape], factors: tuple[str, str], core: str | None, whole: str | None
) -> FormSize:
    """Of one factor of the form: a matrix, a product of two, or one with a core between them."""
    if whole is not None and whole in shapes:
        rows, columns = _matrix(path, whole, shapes)
        return FormSize(rows, columns, min(rows, columns))
    left, right = (_matrix(path, role, shapes) for role in factors)
    if core is None or core not in shapes:
        if left[1] != right[0]:
            raise FileBroken(f"{path}: {factors[0]} has {left[1]} columns, {factors[1]} has {right[0]} rows.")
        return FormSize(left[0], right[1], right[0])
    shape = shapes[core]
    # beside a core both factors have their rank first
    matrices = all(len(shapes[role]) == 2 for role in factors)
    if len(shape) != 4 or 0 in shape or shape[:2] != (left[0], right[0]) or not matrices:
        raise FileBroken(
            f"{path}: the core {core} of the shape {shape} does not fit {factors[0]} of {shapes[factors[0]]} and "
            f"{factors[1]} of {shapes[factors[1]]}."
        )
    size = FormSize(left[1], right[1] * math.prod(shape[2:]), left[0])
    _check(path, size)  # the core goes into the right factor before anything is made smaller
    return size


def _matrix(path: str, role: str, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """(rows, columns) of a tensor, flattened from its second side on."""
    if role not in shapes:
        raise FileBroken(f"{path}: {role} is missing; it has {', '.join(sorted(shapes))}.")
    shape = shapes[role]
    if len(shape) < 2 or 0 in shape:
        raise FileBroken(f"{path}: {role} has the shape {shape}, which is neither a matrix nor a convolution's.")
    return shape[0], math.prod(shape[1:])


def _check(path: str, size: FormSize) -> None:
    if size.rank > MAX_FORM_RANK:
        raise MergeRefused(
            f"{path} is a LoRA of rank {size.rank} exactly; forms above {MAX_FORM_RANK} are not converted."
        )
    if max(size.d_out, size.d_in) > MAX_FORM_SIDE:
        raise MergeRefused(
            f"{path}: ΔW is {size.d_out}×{size.d_in}; forms with a side above {MAX_FORM_SIDE} are not converted."
        )
    if size.bytes > MAX_FORM_BYTES:
        raise MergeRefused(
            f"{path} is a LoRA of rank {size.rank} and {size.d_out}×{size.d_in}, which takes {size.bytes} bytes; "
            f"forms above {MAX_FORM_BYTES} are not converted."
        )
