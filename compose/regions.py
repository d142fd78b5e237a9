"""Places of an image in which adapters of their own act and words of their own are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from compose.scene import Conditioning

Size = tuple[int, int]


def resized(masks: Tensor, size: Size) -> Tensor:
    """(n, h, w) → (n, H, W): each pixel has the value of the cell that its centre lies in."""
    if tuple(masks.shape[-2:]) == size:
        return masks
    return functional.interpolate(masks[:, None], size=size, mode="nearest-exact")[:, 0]


@dataclass(slots=True)
class Regions:
    """Which adapters act where, and which words are read there.

    Attributes:
        shares: (regions, h, w) from 0 to 1, float32, summing to 1 over the regions.
        adapters: for each region the adapters that act in it, with their weights.
        words: for each region.
    """

    shares: Tensor
    adapters: Sequence[Mapping[str, float]]
    words: Sequence[Conditioning]
    _sized: dict[Size, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not len(self.shares) == len(self.adapters) == len(self.words):
            raise ValueError("every region has a share, adapters and words")

    def __len__(self) -> int:
        return len(self.words)

    @property
    def names(self) -> list[str]:
        """Every adapter that acts anywhere."""
        return list(dict.fromkeys(name for adapters in self.adapters for name in adapters))

    def at(self, size: Size) -> Tensor:
        """(regions, h, w) on another grid."""
        if size not in self._sized:
            self._sized[size] = resized(self.shares, size)
        return self._sized[size]

    def weight(self, name: str) -> float | None:
        """The weight of an adapter that acts everywhere alike; None for one that does not."""
        weights = {adapters.get(name, 0.0) for adapters in self.adapters}
        return weights.pop() if len(weights) == 1 else None

    def factor(self, name: str, size: Size) -> Tensor:
        """(h, w): the weight with which an adapter acts at each place."""
        weights = torch.tensor([adapters.get(name, 0.0) for adapters in self.adapters], device=self.shares.device)
        return (self.at(size) * weights[:, None, None]).sum(dim=0)
