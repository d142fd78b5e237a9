"""Cross-attention maps of a UNet: where the words look, averaged over the layers of one grid and their heads.

Grids are told by how many times coarser than the latent they are, read from the blocks of the UNet at hand, so that any
size and any UNet of diffusers' UNet2DConditionModel will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from compose.attention_processor import (
    PlainAttention,
    check_plain,
    given_mask,
    key_of,
    probabilities_of,
    query_of,
    value_of,
)
from compose.map_grid import choose_grid


class Stop(Exception):
    """Ends a forward pass in the last layer that it was for."""


@dataclass(frozen=True, slots=True)
class MapLayer:
    """A cross-attention layer: its path in the UNet, and the factor by which its grid is coarser than the latent."""

    path: str
    factor: int


def block_factors(unet: Any) -> list[tuple[str, Any, int]]:
    """Path, module and grid of each block, in the order of a forward pass. The grid is the factor by which it is
    coarser than the latent."""
    found = []
    factor = 1
    for index, block in enumerate(unet.down_blocks):
        found.append((f"down_blocks.{index}", block, factor))
        factor *= 2 if getattr(block, "downsamplers", None) else 1
    if unet.mid_block is not None:
        found.append(("mid_block", unet.mid_block, factor))
    for index, block in enumerate(unet.up_blocks):
        found.append((f"up_blocks.{index}", block, factor))
        factor //= 2 if getattr(block, "upsamplers", None) else 1
    return found


_LAYERS: WeakKeyDictionary[Any, tuple[MapLayer, ...]] = WeakKeyDictionary()
"""Of UNets that are in memory: adapters come and go inside the layers."""


def map_layers(unet: Any) -> tuple[MapLayer, ...]:
    """Every cross-attention layer, in the order in which a forward pass meets them."""
    if unet not in _LAYERS:
        _LAYERS[unet] = tuple(_map_layers(unet))
    return _LAYERS[unet]


def _map_layers(unet: Any) -> list[MapLayer]:
    return [
        MapLayer(f"{prefix}.{name}", factor)
        for prefix, block, factor in block_factors(unet)
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == "attn2" and getattr(module, "is_cross_attention", True)
    ]


def map_factor(unet: Any, wanted: int | None = None) -> int:
    """How many latent pixels a side are one cell of the maps: see `compose.map_grid.choose_grid`."""
    native = unet.config.sample_size
    side = native if isinstance(native, int) else max(native)
    return choose_grid([layer.factor for layer in map_layers(unet)], side, wanted)


@dataclass(slots=True)
class MapRecorder:
    """Sums maps while forward passes run; in `installed` only.

    Attributes:
        grid: (h, w) of the maps.
        recording: whether passes are looked at. Off while activations are computed again for a gradient.
        stopping: whether a pass ends after the last layer with a map.
    """

    unet: Any
    factor: int
    grid: tuple[int, int]
    recording: bool = False
    stopping: bool = False
    _sum: Tensor | None = field(default=None, repr=False)
    _count: int = 0
    _paths: list[str] | None = field(default=None, repr=False)

    @property
    def layers(self) -> list[str]:
        """Paths, in the order of a forward pass."""
        if self._paths is None:
            self._paths = [layer.path for layer in map_layers(self.unet) if layer.factor == self.factor]
        return self._paths

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Layers of this grid show their maps; afterwards they have the processors that they had.

        Raises:
            ComposeRefused: a layer attends by fused projections, xformers or another way that forms no probabilities.
        """
        layers = [self.unet.get_submodule(path) for path in self.layers]
        for path, layer in zip(self.layers, layers, strict=True):
            check_plain(path, layer)
        before = [layer.processor for layer in layers]
        try:
            for layer in layers:
                layer.set_processor(_Recording(self, last=layer is layers[-1]))
            yield
        finally:
            for layer, processor in zip(layers, before, strict=True):
                layer.set_processor(processor)
            self._sum, self._count = None, 0

    @contextmanager
    def watching(self, *, stopping: bool = False) -> Iterator[None]:
        """Passes inside are recorded; `take` gives what was seen."""
        self._sum, self._count = None, 0
        self.recording, self.stopping = True, stopping
        try:
            yield
        finally:
            self.recording, self.stopping = False, False

    def take(self) -> Tensor:
        """(batch, h·w, tokens) in float32: mean over layers and heads; each row sums to 1."""
        if self._sum is None or self._count != len(self.layers):
            raise AssertionError(f"{self._count} of {len(self.layers)} layers were seen")
        found = self._sum / self._count
        self._sum, self._count = None, 0
        return found

    def add(self, probabilities: Tensor) -> None:
        """(batch, heads, h·w, tokens) of one layer."""
        mean = probabilities.mean(dim=1)
        self._sum = mean if self._sum is None else self._sum + mean
        self._count += 1


class _Recording(PlainAttention):
    """Attention that forms its probabilities, in float32, and shows them."""

    def __init__(self, recorder: MapRecorder, *, last: bool) -> None:
        self.recorder = recorder
        self.last = last

    def attend(self, attn: Any, states: Tensor, context: Tensor, attention_mask: Tensor | None) -> Tensor:
        query, key, value = query_of(attn, states), key_of(attn, context), value_of(attn, context)
        probabilities = probabilities_of(attn, query, key, given_mask(attn, attention_mask, context))
        self._show(probabilities)
        return probabilities.to(value.dtype) @ value

    def _show(self, probabilities: Tensor) -> None:
        recorder = self.recorder
        if not recorder.recording:
            return
        rows, columns = recorder.grid
        if probabilities.shape[2] != rows * columns:
            raise AssertionError(f"a map of {probabilities.shape[2]} cells is none of {rows}×{columns}")
        recorder.add(probabilities)
        if self.last and recorder.stopping:
            raise Stop
