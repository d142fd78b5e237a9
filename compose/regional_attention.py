"""Cross-attention in which every region of the image reads its own words with its own adapters, in one pass.

At place p: Σ_r share_r(p)·softmax(scale·q_p·K_rᵀ)·V_r, where K_r and V_r come from region r's words and adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compose.adapter_switch import activate
from compose.attention_maps import Stop, map_layers
from compose.attention_processor import (
    PlainAttention,
    attended,
    check_plain,
    key_of,
    probabilities_of,
    query_of,
    value_of,
)
from compose.regions import Regions


@dataclass(slots=True)
class RegionalAttention:
    """The regions of an image, as the cross-attention layers of a UNet see them.

    Words are those of the regions; what the UNet is called with only tells by its batch whether the negative prompt's
    half is asked for.

    Attributes:
        latent_size: (h, w).
        factor: the grid whose maps are recorded.
        recording: whether passes are looked at; every region's words are then seen at every place.
        stopping: whether a pass ends after the last layer with a map.
    """

    unet: Any
    regions: Regions
    latent_size: tuple[int, int]
    factor: int
    recording: bool = False
    stopping: bool = False
    _sums: list[Tensor] = field(default_factory=list, repr=False)
    _count: int = 0
    _map_layers: int = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Raises ComposeRefused when a layer attends in another way than diffusers' plain one."""
        layers = [(layer, self.unet.get_submodule(layer.path)) for layer in map_layers(self.unet)]
        for layer, module in layers:
            check_plain(layer.path, module)
        shown = [layer.path for layer, _ in layers if layer.factor == self.factor]
        self._map_layers = len(shown)
        before = [module.processor for _, module in layers]
        try:
            for layer, module in layers:
                module.set_processor(
                    _Regional(self, layer.factor, shows=layer.path in shown, last=layer.path == shown[-1])
                )
            yield
        finally:
            for (_, module), processor in zip(layers, before, strict=True):
                module.set_processor(processor)
            self._sums, self._count = [], 0

    @contextmanager
    def watching(self, *, stopping: bool = False) -> Iterator[None]:
        """Passes inside are recorded; `take` gives what was seen."""
        self._sums, self._count = [], 0
        self.recording, self.stopping = True, stopping
        try:
            yield
        finally:
            self.recording, self.stopping = False, False

    def take(self) -> list[Tensor]:
        """For each region (batch, h·w, tokens) in float32, mean over layers and heads."""
        if self._count != self._map_layers:
            raise AssertionError(f"{self._count} of {self._map_layers} layers were seen")
        found = [item / self._count for item in self._sums]
        self._sums, self._count = [], 0
        return found

    def add(self, maps: list[Tensor]) -> None:
        """(batch, h·w, tokens) of each region, of one layer."""
        self._sums = [one + other for one, other in zip(self._sums, maps, strict=True)] if self._sums else maps
        self._count += 1

    def grid(self, factor: int) -> tuple[int, int]:
        height, width = self.latent_size
        return -(-height // factor), -(-width // factor)


class _Regional(PlainAttention):
    """One layer. Keys and values depend on words alone, so that they are made once."""

    def __init__(self, owner: RegionalAttention, factor: int, *, shows: bool, last: bool) -> None:
        self.owner, self.factor, self.shows, self.last = owner, factor, shows, last
        self._known: list[tuple[Tensor, Tensor]] = []

    def attend(self, attn: Any, states: Tensor, context: Tensor, attention_mask: Tensor | None) -> Tensor:
        del attention_mask
        owner, query = self.owner, query_of(attn, states)
        if not self._known:
            self._known = [self._words(attn, index) for index in range(len(owner.regions))]
        shares = owner.regions.at(owner.grid(self.factor)).flatten(1).to(query)
        recording = self.shows and owner.recording
        maps: list[Tensor] = []
        total = torch.zeros_like(query)
        for share, (keys, values) in zip(shares, self._known, strict=True):
            key, value = keys[-len(context) :], values[-len(context) :]
            if recording:
                probabilities = probabilities_of(attn, query, key)
                maps.append(probabilities.mean(dim=1))
                found = probabilities.to(value.dtype) @ value
            else:
                found = attended(attn, query, key, value)
            total = total + share[:, None] * found
        if recording:
            owner.add(maps)
            if self.last and owner.stopping:
                raise Stop
        return total

    def _words(self, attn: Any, index: int) -> tuple[Tensor, Tensor]:
        """(2, heads, tokens, d) of keys and of values, the negative prompt's first."""
        regions = self.owner.regions
        for layer in (attn.to_k, attn.to_v):
            activate(layer, regions.adapters[index])
        context = regions.words[index].context
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        with torch.no_grad():
            return key_of(attn, context), value_of(attn, context)
