"""What of an adapter's file is in a model after it was loaded: found by its numbers, whatever they are called there."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.errors import RankwiseError
from artifacts.layout import read_layout
from artifacts.manifest import LoraModule
from workers.engines.hollow_models import is_one_number

MAX_NAMES = 20
_PREFIXES = re.compile(r"(?:base_model\.|model\.|text_model\.|language_model\.|transformer\.)*")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save|original_module)(?=\.|$)")
_DERIVED = re.compile(
    r"\.ranknum(\.|$)|\.delta_embedding\.weight$|\.(frozen|trainable)_embedding$|\.base_layer\.(weight|bias)$"
)
"""Parameters that no file has as they are: PEFT computes the number of ranks, starts an offset at 0, saves two parts of
a prompt as one, and some initialisations change the base's weights."""
_RELATIVE = 1e-6


@dataclass(slots=True)
class Count:
    """What was found.

    Attributes:
        modules: of the adapter's file: path → whether all its numbers are in the model.
        unexpected: keys of the file whose numbers are nowhere in the model.
        missing: parameters that the engine made for the adapter and that hold none of the file's numbers.
        tensors: in the file, but those that only tell a scaling.
        compared: modules whose rank and scaling the engine tells.
        differences: those that it has otherwise than the file says, with both ranks and both scalings.
    """

    modules: dict[str, bool] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    tensors: int = 0
    compared: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def loaded(self) -> int:
        """Modules with all their numbers."""
        return sum(self.modules.values())

    @property
    def verdict(self) -> str:
        """loads, changes, partly or nothing."""
        if len(self.unexpected) == self.tensors:
            return "nothing"
        if self.loaded < len(self.modules) or self.unexpected or self.missing:
            return "partly"
        return "changes" if self.differences else "loads"

    def report(self) -> dict[str, Any]:
        """For people and for JSON: counts, and the first names of each kind."""
        idle = [path for path, whole in self.modules.items() if not whole]
        return {
            "modules": {"of_adapter": len(self.modules), "loaded": self.loaded, "not_loaded": idle[:MAX_NAMES]},
            "tensors": self.tensors,
            "unexpected": {"count": len(self.unexpected), "names": self.unexpected[:MAX_NAMES]},
            "missing": {"count": len(self.missing), "names": self.missing[:MAX_NAMES]},
            "scaling": {
                "compared": self.compared,
                "different": len(self.differences),
                "modules": self.differences[:MAX_NAMES],
            },
        }


@dataclass(frozen=True, slots=True)
class _Live:
    """A tensor of the model that is not the base's: its name there, its layer's canonical path, and its digest."""

    name: str
    path: str
    digest: bytes | None
    is_parameter: bool


def count(
    path: Path, weights: Path, components: Mapping[str, nn.Module], placeholders: set[int], adapter: str
) -> Count:
    """Compare the file with the model that it was loaded into.

    Args:
        path: what was loaded; `weights` is its safetensors file.
        placeholders: the memory of the base's own parameters (`HollowModel.placeholders`).
        adapter: what the engine was told to call it.
    """
    described = _described(path)
    module_of = {key: module.path for module in described for key in _keys(module)}
    live = list(_live(components, placeholders, adapter))
    digests = _digests(weights)
    places = _matched(digests, live, module_of)
    result = Count(tensors=len(places))
    for key, place in places.items():
        module = module_of.get(key) or _module_path(key)
        result.modules[module] = result.modules.get(module, True) and place is not None
        if place is None:
            result.unexpected.append(key)
    own = set(digests.values())
    made_up = (item.name for item in live if item.is_parameter and item.digest not in own)
    result.missing = [name for name in made_up if not _DERIVED.search(name)]
    _compare(result, described, places, components, adapter)
    return result


def _described(path: Path) -> tuple[LoraModule, ...]:
    try:
        return read_layout(path).modules
    except RankwiseError:
        return ()  # a type whose modules are not described; its tensors are counted all the same


def _keys(module: LoraModule) -> list[str]:
    return [key for key in (*module.factor_keys, module.bias_key, module.magnitude_key) if key is not None]


def _digests(weights: Path) -> dict[str, bytes]:
    """Key → digest of the numbers. A scalar alpha is no number of the adapter: it is in the scaling."""
    from safetensors import safe_open

    found: dict[str, bytes] = {}
    with safe_open(weights, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            if not key.endswith(".alpha"):
                found[key] = _digest(file.get_tensor(key))
    return found


def _digest(tensor: Tensor) -> bytes:
    """Of the numbers in order, whatever their shape and dtype: engines reshape and cast up."""
    whole = tensor.detach()
    if whole.is_floating_point():
        whole = whole.to(torch.float32)
    elif not whole.is_complex():
        whole = whole.to(torch.int64)
    return hashlib.sha256(whole.contiguous().view(-1).view(torch.uint8).numpy().data).digest()


def _live(components: Mapping[str, nn.Module], placeholders: set[int], adapter: str) -> Iterator[_Live]:
    known: dict[int, bytes | None] = {}  # what layers share is looked at once
    for component, model in components.items():
        prefix = f"{component}." if component else ""
        parameters = model.named_parameters(remove_duplicate=False)
        others = [*model.named_buffers(remove_duplicate=False), *_loose(model, adapter)]
        for is_parameter, named in ((True, parameters), (False, others)):
            for name, tensor in named:
                on_meta = tensor.device.type == "meta"
                if not on_meta and tensor.untyped_storage().data_ptr() in placeholders:
                    continue
                if id(tensor) not in known:
                    known[id(tensor)] = None if on_meta or is_one_number(tensor) else _digest(tensor)
                plain = _WRAPPERS.sub("", f"{prefix}{name}".replace(f".{adapter}", ""))
                yield _Live(f"{prefix}{name}", _canonical(_module_path(plain)), known[id(tensor)], is_parameter)


def _loose(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a layer keeps in a plain dictionary, as SHiRA does its indices; a prompt that is kept in parts."""
    for name, module in model.named_modules():
        if hasattr(module, "load_prompt_embeddings") and isinstance(getattr(module, "weight", None), Tensor):
            yield f"{name}.weight", module.weight.detach()
        for attribute, value in vars(module).items():
            if isinstance(value, dict) and isinstance(value.get(adapter), Tensor):
                yield f"{name}.{attribute}.{adapter}", value[adapter]


def _matched(
    digests: Mapping[str, bytes], live: Sequence[_Live], module_of: Mapping[str, str]
) -> dict[str, str | None]:
    """Key of the file → name of the tensor of the model that has its numbers, None where none has.

    Where several tensors are equal, those at the same place go together first; each of the model's counts for one of
    the file's.
    """
    at: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for item in live:
        if item.digest is not None:
            at[item.digest][item.path].append(item.name)
    found: dict[str, str | None] = {}
    left = []
    for key, digest in digests.items():
        same = at[digest].get(_canonical(module_of.get(key) or _module_path(key)))
        if same:
            found[key] = same.pop()
        else:
            found[key] = None
            left.append(key)
    for key in left:
        others = next((names for names in at[digests[key]].values() if names), None)
        found[key] = others.pop() if others else None
    return found


def _compare(
    result: Count,
    described: Sequence[LoraModule],
    places: Mapping[str, str | None],
    components: Mapping[str, nn.Module],
    adapter: str,
) -> None:
    """Rank and scaling as the engine has them, against what the file says."""
    for module in described:
        place = places.get(module.factor_keys[0])
        layer = None if place is None else _layer(components, place, adapter)
        if layer is None:
            continue
        rank, scaling = int(layer.r[adapter]), float(layer.scaling[adapter])
        result.compared += 1
        if rank != module.rank or abs(scaling - module.scaling) > _RELATIVE * abs(module.scaling):
            result.differences.append(
                {
                    "module": module.path,
                    "rank": module.rank,
                    "engine_rank": rank,
                    "scaling": module.scaling,
                    "engine_scaling": scaling,
                }
            )


def _layer(components: Mapping[str, nn.Module], name: str, adapter: str) -> Any:
    """The layer that a tensor is in, if it tells the adapter's rank and scaling."""
    for component, model in components.items():
        rest = name.removeprefix(f"{component}.") if component else name
        if component and rest == name:
            continue
        while rest:
            rest = rest.rpartition(".")[0]
            layer: Any = model.get_submodule(rest)
            ranks, scalings = getattr(layer, "r", None), getattr(layer, "scaling", None)
            if (
                isinstance(ranks, Mapping)
                and isinstance(scalings, Mapping)
                and {adapter} <= ranks.keys() & scalings.keys()
            ):
                return layer
    return None


def _module_path(key: str) -> str:
    """The layer that a tensor belongs to."""
    path = key.removesuffix(".weight").removesuffix(".bias")
    before, _, last = path.rpartition(".")
    return before if before and last.startswith(_roles()) else path


@cache
def _roles() -> tuple[str, ...]:
    """How the names of the parameters of each type of adapter begin."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return tuple({*PEFT_TYPE_TO_PREFIX_MAPPING.values()} - {"", None})


def _canonical(path: str) -> str:
    """Without the levels in front that one side has and the other has not."""
    component, dot, rest = path.partition(".")
    if dot and component in ("unet", "text_encoder", "text_encoder_2"):
        return f"{component}.{_PREFIXES.sub('', rest, count=1)}"
    return _PREFIXES.sub("", path, count=1)
