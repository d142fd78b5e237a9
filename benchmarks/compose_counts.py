"""What composition costs, counted: samples through the UNet, what a truncated pass saves, bytes of an update."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from compose.attention_maps import MapRecorder, Stop, map_factor


@dataclass(frozen=True, slots=True)
class Counted:
    """Samples: forward to the end, forward up to the last map, and backward."""

    full: int
    truncated: int
    backward: int

    def weighed(self, share: float) -> float:
        """Whole passes of the same cost: a truncated pass, and the way back through it, is `share` of one."""
        return self.full + share * (self.truncated + self.backward)


def truncated_share(unet: Any) -> float:
    """Multiplications of a pass up to the last layer with a map, as a share of a whole pass."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return _share(UNet2DConditionModel.from_config(dict(unet.config)))


def sd15_truncated_share() -> float:
    """Of the UNet of Stable Diffusion 1.5 at 512 pixels."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return _share(UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8))


def _share(unet: Any) -> float:
    """Of a UNet on the device meta, on which nothing is computed."""
    side, factor = int(unet.config.sample_size), map_factor(unet)
    recorder = MapRecorder(unet, factor, (side // factor, side // factor))
    found = []
    with torch.device("meta"), torch.no_grad(), recorder.installed():
        sample = torch.empty(1, unet.config.in_channels, side, side)
        context = torch.empty(1, 77, unet.config.cross_attention_dim)
        for stopping in (True, False):
            with FlopCounterMode(display=False) as counter, recorder.watching(stopping=stopping):
                _pass(unet, sample, context)
            found.append(counter.get_total_flops())
    return found[0] / found[1]


def _pass(unet: Any, sample: Any, context: Any) -> None:
    try:
        unet(sample, torch.empty(1), encoder_hidden_states=context)
    except Stop:
        return


class _Storages(TorchDispatchMode):
    """Adds up the storages of what operations return, for as long as each is alive."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {id(item.untyped_storage()) for item in _tensors((args, kwargs))}
        for item in _tensors(found):
            self._note(item.untyped_storage(), given)
        return found

    def _note(self, storage: Any, given: set[int]) -> None:
        key = id(storage)
        if key in self._alive or key in given:  # a view, or written in place
            return
        self._alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [item for item in tree_leaves(tree) if isinstance(item, torch.Tensor)]


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at a time that were made by `work`; what was there before does not count."""
    with _Storages() as storages:
        work()
    return storages.peak
