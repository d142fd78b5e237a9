"""Whether a written adapter reads back as it was computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import ReloadMismatch
from merge.threads import module_threads

TOLERANCE = 1e-5
"""Largest relative difference of ΔW·x between the written factors and those read back: rounding of the products."""

CANCELLATION = 1e-6
"""The same as a part of ‖B‖·‖A·x‖, a few roundings of float32: what comes of large terms that nearly cancel, such as
the factors of a PiSSA adapter and those that it began with, is not more exact than its terms."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """ΔW·x of one module for a fixed random x, before and after the cast to the output dtype.

    Attributes:
        terms: ‖B‖·‖A·x‖ of the written factors, which bounds ‖ΔW·x‖.
    """

    path: str
    exact: Tensor
    written: Tensor
    terms: float

    @classmethod
    def of(cls, path: str, A: Tensor, B: Tensor, cast_A: Tensor, cast_B: Tensor) -> Self:
        """From the computed factors (r, d_in), (d_out, r) and those that are written."""
        x = _probe_vector(A.shape[1]).to(A.device)
        last = cast_B.float()
        inner = cast_A.float() @ x
        return cls(path, _apply(A, B, x), (last @ inner).cpu(), float(last.norm() * inner.norm()))

    @property
    def tolerance(self) -> float:
        """Largest relative difference of what is read back."""
        norm = float(self.written.norm())
        return TOLERANCE + CANCELLATION * self.terms / norm if norm > 0 else TOLERANCE


@lru_cache(maxsize=16)
def _probe_vector(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size))


def _apply(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    return (B.float() @ (A.float() @ x)).cpu()


def check_reload(directory: Path, probes: Sequence[Probe], tick: Callable[[], None]) -> tuple[float, float]:
    """Open the written adapter and apply each module to its probe.

    Returns: the largest relative rounding error of the cast, and the largest relative difference on reading back.

    Raises:
        ReloadMismatch: a module is missing, or differs by more than its tolerance.
    """
    tick()
    adapter = Adapter.open(directory)
    rounding = largest = 0.0
    with module_threads() as pool:
        for probe, difference in zip(probes, pool.map(lambda probe: _difference(adapter, probe), probes), strict=True):
            # a NaN must not pass as "not greater"
            if not difference <= probe.tolerance:
                raise ReloadMismatch(
                    f"Module {probe.path} of the written adapter differs by {difference:.2e} from what was computed.",
                    hint="Writing as float32 (output_dtype) rules out an overflow; otherwise suspect the disk.",
                )
            largest = max(largest, difference)
            rounding = max(rounding, _relative(probe.written, probe.exact))
    return rounding, largest


def _difference(adapter: Adapter, probe: Probe) -> float:
    """Relative difference of the stored module from the written one, on the probe."""
    if probe.path not in adapter:
        raise ReloadMismatch(f"The written adapter does not hold module {probe.path}.")
    factors = adapter[probe.path]
    result = _apply(factors.A, factors.B, _probe_vector(factors.A.shape[1])) * factors.scaling
    adapter.release(probe.path)
    return _relative(result, probe.written)


def _relative(value: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    difference = float((value - reference).norm())
    return difference / norm if norm > 0 else difference
