"""Self-attention in which places of one box do not see those of another (arXiv:2403.11627)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compose.attention_maps import block_factors
from compose.attention_processor import (
    PlainAttention,
    attended,
    check_plain,
    key_of,
    probabilities_of,
    query_of,
    value_of,
)
from compose.regions import Size, resized


@dataclass(slots=True)
class Isolation:
    """The boxes, as the self-attention layers of a UNet see them.

    Attributes:
        masks: (boxes, h, w) of 0 and 1 at the latent's size.
        isolating: whether boxes are kept from seeing each other; if not, maps are recorded only.
        factor: the grid whose maps are recorded.
    """

    unet: Any
    masks: Tensor
    factor: int
    isolating: bool = True
    recording: bool = False
    _sum: Tensor | None = field(default=None, repr=False)
    _count: int = 0
    _blocked: dict[Size, Tensor] = field(default_factory=dict, repr=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Raises ComposeRefused when a layer attends in another way than diffusers' plain one."""
        layers = [
            (f"{prefix}.{name}", module, factor)
            for prefix, block, factor in block_factors(self.unet)
            for name, module in block.named_modules()
            if name.rpartition(".")[2] == "attn1"
        ]
        for path, module, _ in layers:
            check_plain(path, module)
        before = [module.processor for _, module, _ in layers]
        try:
            for _, module, factor in layers:
                module.set_processor(_Isolated(self, factor))
            yield
        finally:
            for (_, module, _), processor in zip(layers, before, strict=True):
                module.set_processor(processor)
            self._sum, self._count = None, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Passes inside are recorded; `take` gives what was seen."""
        self._sum, self._count, self.recording = None, 0, True
        try:
            yield
        finally:
            self.recording = False

    def take(self) -> Tensor:
        """(batch, h·w, h·w) in float32, mean over layers and heads, from each place to each."""
        if self._sum is None:
            raise AssertionError("no self-attention was seen on this grid")
        found = self._sum / self._count
        self._sum, self._count = None, 0
        return found

    def add(self, probabilities: Tensor) -> None:
        """(batch, heads, h·w, h·w) of one layer."""
        mean = probabilities.mean(dim=1)
        self._sum = mean if self._sum is None else self._sum + mean
        self._count += 1

    def blocked(self, factor: int) -> Tensor:
        """(h·w, h·w): true from a place in boxes to one in boxes, where they have no box in common."""
        rows, columns = (-(-side // factor) for side in self.masks.shape[1:])
        size = (rows, columns)
        if size not in self._blocked:
            inside = resized(self.masks, size).flatten(1).T
            boxed = inside.amax(dim=1) > 0
            self._blocked[size] = boxed[:, None] & boxed[None] & (inside @ inside.T == 0)
        return self._blocked[size]


class _Isolated(PlainAttention):
    def __init__(self, owner: Isolation, factor: int) -> None:
        self.owner, self.factor = owner, factor

    def attend(self, attn: Any, states: Tensor, context: Tensor, attention_mask: Tensor | None) -> Tensor:
        del attention_mask
        owner = self.owner
        query, key, value = query_of(attn, states), key_of(attn, context), value_of(attn, context)
        mask = None
        if owner.isolating:
            blocked = owner.blocked(self.factor)
            mask = query.new_zeros(blocked.shape).masked_fill(blocked, float("-inf"))
        if not (owner.recording and self.factor == owner.factor):
            return attended(attn, query, key, value, mask)
        probabilities = probabilities_of(attn, query, key, mask)
        owner.add(probabilities)
        return probabilities.to(value.dtype) @ value
