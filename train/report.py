"""The report of a training, and the memory that it took."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from train.protocol import Beside

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did.

    Attributes:
        resumed_at: the step at which the attempt that ended took over; 0 if none was interrupted.
        seconds, tokens_per_second: of the loop, in that attempt; None tokens where rows have none.
        peak_memory: {resident, device} bytes: largest resident set of the process, largest allocation on the GPU.
        evaluation: {before, after, difference}, empty when nothing was held out.
        reload: how far PEFT's reload of the written file is from the trained model.
        own: what the method itself tells; its "pictures" are shown by GET /jobs/{id}/pictures.
        early_stopping: what was measured on the way and which step was taken (`train.early_stopping`); empty without.
        devices: that the rows of a batch were shared out among.
        continued_from: the adapter that the training went on from: {adapter, method, compatibility}; its figures before
            the training are those of that adapter.
        warnings: whole sentences.
        beside: other adapters that came out.
    """

    method: str
    steps: int
    resumed_at: int
    seconds: float
    tokens_per_second: float | None
    final_loss: float | None
    trainable_parameters: int
    target_modules: int
    peak_memory: Mapping[str, int | None]
    estimate: Mapping[str, int]
    data: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    reload: Mapping[str, float]
    own: Mapping[str, Any] = field(default_factory=dict)
    early_stopping: Mapping[str, Any] = field(default_factory=dict)
    devices: int = 1
    continued_from: Mapping[str, str] | None = None
    warnings: Sequence[str] = ()
    beside: Sequence[Beside] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values: all but where the other adapters lie."""
        found = asdict(self)
        del found["beside"]
        return found


class MemoryMeter:
    """The peak from its making on, of the device; of the process, since its start."""

    def __init__(self, device: str) -> None:
        self._device = device if device.startswith("cuda") else None
        if self._device is not None:
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> dict[str, int | None]:
        """Bytes."""
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
        device = None if self._device is None else torch.cuda.max_memory_allocated(self._device)
        return {"resident": resident, "device": device}
