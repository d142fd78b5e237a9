"""Masked outputs of adapters: h ← W·h + Σᵢ mᵢ(p)·sᵢ·BᵢAᵢ·h at every place p, in one pass (arXiv:2510.23515)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from artifacts.errors import ComposeRefused, FieldError
from compose.adapter_switch import tuner_layers
from compose.attention_maps import block_factors
from compose.regions import Regions, Size

WORD_LAYERS = ("attn2.to_k", "attn2.to_v")
"""Layers that see words and no places: `compose.regional_attention` gives each region its own."""


@dataclass(frozen=True, slots=True)
class _Place:
    """An adapter layer that sees places, and how much coarser than the latent its grid is."""

    path: str
    layer: Any
    factor: int


@contextmanager
def masked_outputs(
    unet: Any, regions: Regions, latent_size: Size, acts: Callable[[str], bool] = lambda path: True
) -> Iterator[None]:
    """Inside, every adapter of the regions acts with the weight of the place. It must be active with weight 1.

    Args:
        latent_size: (h, w).
        acts: of a layer's path, whether adapters that are kept to regions act in it at all.

    Raises:
        ComposeRefused: an adapter acts in a layer that sees no places, or is none whose output is a factor's.
    """
    with ExitStack() as stack:
        for place in _places(unet, regions, acts):
            for name in regions.names:
                if name in place.layer.scaling:
                    scale = _scale(place, name, regions, latent_size, acts=acts(place.path))
                    stack.callback(place.layer.lora_B[name].register_forward_hook(scale).remove)
        yield


Hook = Callable[[nn.Module, Any, Tensor], Tensor]


def _scale(place: _Place, name: str, regions: Regions, latent_size: Size, *, acts: bool) -> Hook:
    """Multiplies the output of a B with the weight of its adapter at each place."""
    weight = regions.weight(name)
    weight = 0.0 if weight is None and not acts else weight
    if weight is not None:
        constant = weight
        return lambda module, args, output: output * constant
    known: dict[Size, Tensor] = {}

    def by_place(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        spatial = output.ndim == 4
        grid = (output.shape[2], output.shape[3]) if spatial else _grid(latent_size, place, output)
        if grid not in known:
            known[grid] = regions.factor(name, grid).to(output)
        return output * (known[grid] if spatial else known[grid].reshape(-1, 1))

    return by_place


def _grid(latent_size: Size, place: _Place, output: Tensor) -> Size:
    rows, columns = (-(-side // place.factor) for side in latent_size)
    if output.shape[1] != rows * columns:
        raise AssertionError(f"{place.path} has {output.shape[1]} places, not {rows}×{columns}")
    return rows, columns


def _places(unet: Any, regions: Regions, acts: Callable[[str], bool]) -> list[_Place]:
    names = set(regions.names)
    paths = {id(module): path for path, module in unet.named_modules()}
    found = []
    for layer in tuner_layers(unet):
        path = paths[id(layer)]
        having = [name for name in names if name in layer.scaling]
        if not having or path.endswith(WORD_LAYERS):
            continue
        _check_plain_lora(path, layer, having)
        if acts(path) and any(regions.weight(name) is None for name in having):
            _check_sees_places(path, layer)
        found.append(_Place(path, layer, _factor(unet, path)))
    return found


def _factor(unet: Any, path: str) -> int:
    return next((factor for prefix, _, factor in block_factors(unet) if path.startswith(f"{prefix}.")), 1)


def _check_plain_lora(path: str, layer: Any, names: list[str]) -> None:
    if isinstance(layer, LoraLayer) and not any(name in layer.lora_variant for name in names):
        return
    raise _refused(f"An adapter is no plain LoRA in {path}: its output is no sum that a mask could be laid over")


def _check_sees_places(path: str, layer: Any) -> None:
    if isinstance(layer.get_base_layer(), nn.Linear) and ".attentions." not in f".{path}.":
        raise _refused(f"An adapter acts in {path}, which sees no places, so that it can not be kept to a region")


def _refused(detail: str) -> ComposeRefused:
    return ComposeRefused(
        f"{detail}.",
        hint="Take merge or clora, or adapters of attention layers and convolutions.",
        errors=[FieldError("/concepts", detail)],
    )
