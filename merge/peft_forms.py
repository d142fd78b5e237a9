"""What adapters of PEFT's other types, and Rankwise's own, add to each module."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from artifacts import low_rank_forms, weight_forms
from artifacts.adapter import Adapter
from artifacts.base_model import Fingerprint, sides_of
from artifacts.errors import FileBroken, MergeRefused
from artifacts.layout import AdapterLayout
from artifacts.low_rank_forms import Pair
from artifacts.manifest import LoraModule
from artifacts.peft_patterns import PatternTable
from merge.base_weights import BaseWeights, needed
from merge.form_sizes import form_size

PREFIX = "base_model.model."
_NAMED = 20
_MAX_TERMS = 100
_SERIES_SINCE = (0, 18)
"""The release of PEFT that cuts the series of a rotation as it is cut here; earlier ones did it otherwise."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Change:
    """ΔW of one module: a pair (A, B), or the matrix itself.

    `default_rank` is that of the LoRA where no other is asked for; None: the smallest that loses nothing.
    `kernel` is (c_in, kh, kw) of a convolution, whose ΔW has d_in = c_in·kh·kw; () of a linear layer.
    """

    value: Pair | Tensor
    default_rank: int | None = None
    kernel: tuple[int, ...] = ()


@dataclass(frozen=True)
class PeftForms:
    """The modules of an adapter in PEFT's own layout, and what is known of its base model. Tensors are read when a
    module's change is asked for."""

    layout: AdapterLayout
    adapter: Adapter
    modules: Mapping[str, Mapping[str, str]]  # path → name within the module → key
    shared: Mapping[str, str]  # name → key, of what belongs to no module
    sides: Callable[[str], tuple[int, int] | None]
    base: BaseWeights | None
    unpacked: bool

    @classmethod
    def of(
        cls, layout: AdapterLayout, fingerprint: Fingerprint | None, base: BaseWeights | None, *, unpacked: bool
    ) -> PeftForms:
        """Raises MergeRefused: modules that were trained whole, or tensors outside the modules."""
        modules: dict[str, dict[str, str]] = {}
        shared: dict[str, str] = {}
        described = layout.config.method == "dora"  # whose keys may begin with a component of diffusers instead
        if described:
            modules = {module.path: {} for module in layout.modules}
        for key in () if described else layout.header.tensors:
            path, _, name = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if key.startswith(PREFIX):
                modules.setdefault(path, {})[name] = key
            else:
                shared[name] = key
        strays = sorted(shared.keys() - ({"vera_A", "vera_B"} if layout.config.peft_type == "VERA" else set()))
        if strays and modules:
            raise MergeRefused(f"{strays[0]} stands outside {PREFIX}<module>, where PEFT does not load it.")
        if not modules:
            raise FileBroken("The adapter holds no module.")
        whole = layout.config.modules_to_save
        if whole:
            raise MergeRefused(
                f"The adapter holds modules that were trained whole: {', '.join(whole[:_NAMED])}.",
                hint="They can not become part of a LoRA.",
            )
        return cls(layout, Adapter(layout), modules, shared, sides_of(fingerprint or ()), base, unpacked)

    def paths(self) -> list[str]:
        """Of all modules."""
        return sorted(self.modules)

    def change(self, path: str) -> Change:
        """What is added to the module.

        Raises:
            MergeRefused: its form is not converted, the base model does not fit, or numbers are not finite.
            KeyError, IndexError, RuntimeError: tensors that the form does not have.
        """
        kind = self.layout.config.peft_type
        if self.layout.config.method == "dora":
            return self._dora(self.adapter.modules[path])
        tensors = {name: self._tensor(key) for name, key in self.modules[path].items()}
        if kind in _OF_WEIGHTS:
            return self._of_weights(kind, path, tensors)
        if any(tensor.ndim > 2 for tensor in tensors.values()):
            raise MergeRefused(f"{path} is a convolution; only linear layers of {kind} are converted.")
        return Change(self._pair(kind, path, tensors))

    def _tensor(self, key: str) -> Tensor:
        tensor = self.adapter.tensor(key).float()
        if not bool(torch.isfinite(tensor).all()):
            raise MergeRefused(f"{key} holds NaN or infinite numbers.")
        return tensor

    @cached_property
    def _projections(self) -> Pair:
        """VeRA's, which all modules share."""
        return self._tensor(self.shared["vera_A"]), self._tensor(self.shared["vera_B"])

    def _pair(self, kind: str, path: str, tensors: Tensors) -> Pair:
        raw = self.layout.config.raw
        if kind in _NAMES:
            check_names(path, kind, tensors, _NAMES[kind])
        if kind == "ADALORA":
            return self._adalora(path, tensors)
        if kind == "VERA":
            return self._vera(path, tensors)
        if kind == "RANKWISE_LQ_LORA":
            scaling = _number(raw, "lora_alpha") / _number(raw, "r", positive=True)
            trained, start = ((tensors[f"{name}_A"], tensors[f"{name}_B"]) for name in ("lora", "start"))
            if self.unpacked:
                return trained[0], trained[1] * scaling
            return low_rank_forms.difference(trained, start, scaling)
        if kind not in ("LOHA", "LOKR"):
            raise MergeRefused(f"Adapters of the type {kind} are not converted to LoRA.")
        scaling = _pattern(raw, "alpha", path) / _pattern(raw, "r", path, positive=True)
        form_size(path, kind.lower(), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if kind == "LOHA":
            w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return low_rank_forms.loha(w1_a, w1_b, w2_a, w2_b, scaling)
        parts = [
            low_rank_forms.factored(tensors.get(name), tensors.get(f"{name}_a"), tensors.get(f"{name}_b"))
            for name in ("lokr_w1", "lokr_w2")
        ]
        return low_rank_forms.lokr(parts[0], parts[1], scaling)

    def _adalora(self, path: str, tensors: Tensors) -> Pair:
        raw = self.layout.config.raw
        A, B, E = (tensors[f"lora_{name}"] for name in "ABE")
        if not (A.ndim == B.ndim == E.ndim == 2 and A.shape[0] == B.shape[1] and E.shape == (A.shape[0], 1)):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (A, B, E))
            raise FileBroken(f"{path}: lora_A, lora_B and lora_E of shapes {shapes} are no product of one rank.")
        # As PEFT computes it: by the rank that the training began with, whatever has been pruned since.
        return low_rank_forms.adalora(
            A, B, E, _number(raw, "lora_alpha") / (_number(raw, "init_r", positive=True) + 1e-5)
        )

    def _vera(self, path: str, tensors: Tensors) -> Pair:
        if not {"vera_A", "vera_B"} <= self.shared.keys():
            raise MergeRefused(
                "The adapter was saved without its projections (save_projection=False).",
                hint="Save it with save_projection=True.",
            )
        sides = self.sides(path)
        if sides is None:
            raise MergeRefused(
                f"A VeRA adapter does not tell the sides of its layers, and neither does its base model: {path}.",
                hint="Register the base model from a folder of the server (POST /models), and name it as base_model.",
            )
        b, d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        A, B = self._projections
        if b.shape[0] != sides[0] or A.shape[1] < sides[1]:
            raise MergeRefused(f"{path} of the base model has other sides than the adapter.")
        return low_rank_forms.vera(A, B, d, b, sides[1])

    def _dora(self, module: LoraModule) -> Change:
        """ΔW = diag(m / ‖W + s·B·A‖)·(W + s·B·A) − W, norms of rows; s·B·A of a component without magnitudes."""
        path, A, B = module.path, self._tensor(module.a_key), self._tensor(module.b_key)
        if module.bias_key is not None and bool(self._tensor(module.bias_key).any()):
            raise MergeRefused(f"{module.bias_key} was trained, a vector that no LoRA adds.")
        if module.kind != "linear":
            raise MergeRefused(f"{path} is no linear layer; only those of DoRA are converted.")
        if module.magnitude_key is None:
            return Change((A, module.scaling * B))
        magnitude, W = self._tensor(module.magnitude_key).flatten(), linear_weight(needed(self.base, "DoRA"), path)
        fits(path, W, (B.shape[0], A.shape[1]))
        delta = weight_forms.dora(W[:, :, None], module.scaling * (B @ A)[:, :, None], magnitude, axis=0)
        return Change(delta.flatten(1), 2 * A.shape[0])

    def _of_weights(self, kind: str, path: str, tensors: Tensors) -> Change:
        title, names, form = _OF_WEIGHTS[kind]
        base = needed(self.base, title)
        check_names(path, title, tensors, names)
        return Change(form(self, base, path, tensors))

    def _oft(self, base: BaseWeights, path: str, tensors: Tensors) -> Tensor:
        """Rotations of the inputs, from the upper triangles of skew-symmetric blocks."""
        raw, upper = self.layout.config.raw, tensors["oft_R"]
        size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
        W = linear_weight(base, path)
        shared = bool(raw.get("block_share"))
        if upper.ndim != 2 or size * (size - 1) // 2 != upper.shape[1] or (shared and upper.shape[0] != 1):
            raise FileBroken(f"{path}: oft_R of shape {tuple(upper.shape)} is no row of an upper triangle per block.")
        if W.shape[1] % size or (not shared and W.shape[1] != size * upper.shape[0]):
            raise misfit(path, f"{upper.shape[0]} blocks of {size} inputs", W)
        Q = weight_forms.skew(upper, size)
        if raw.get("coft"):
            Q = weight_forms.bounded(Q, _number(raw, "eps", 6e-5))
        if raw.get("use_cayley_neumann", True):
            if _release(raw) < _SERIES_SINCE:
                raise MergeRefused(
                    "The rotations are those of PEFT before 0.18, whose series was another one.",
                    hint="Train it again with a later release, or without use_cayley_neumann.",
                )
            terms = _number(raw, "num_cayley_neumann_terms", 5)
            if not 1 <= terms <= _MAX_TERMS:
                raise MergeRefused(f"num_cayley_neumann_terms is {terms:g}; from 1 to {_MAX_TERMS} are converted.")
            R = weight_forms.neumann_cayley(Q, int(terms))
        else:
            R = weight_forms.cayley(-Q)  # PEFT solves for (I − Q)·(I + Q)⁻¹, of which its series is the inverse
        return weight_forms.oft_of_inputs(W, R)

    def _boft(self, base: BaseWeights, path: str, tensors: Tensors) -> Tensor:
        """Butterfly factors on the inputs, and a scale of every output."""
        blocks, scales = tensors["boft_R"], tensors["boft_s"].flatten()
        W = linear_weight(base, path)
        if blocks.ndim != 4 or blocks.shape[2] != blocks.shape[3]:
            raise FileBroken(f"{path}: boft_R of shape {tuple(blocks.shape)} is no stack of square blocks.")
        factors, count, size = blocks.shape[:3]
        if (scales.shape[0], count * size) != tuple(W.shape):
            raise misfit(path, f"{scales.shape[0]} outputs and {count} blocks of {size} inputs", W)
        if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
            raise FileBroken(f"{path}: {count} blocks of {size} are none of a butterfly of {factors} factors.")
        R = weight_forms.cayley(-(blocks - blocks.transpose(-1, -2)) / 2)
        return weight_forms.boft_of_inputs(W, R, scales)

    def _ia3(self, base: BaseWeights, path: str, tensors: Tensors) -> Tensor:
        """ΔW = W∘l − W, with a row of scales of the inputs, or a column of scales of the outputs."""
        scales, W = tensors["ia3_l"], linear_weight(base, path)
        if tuple(scales.shape) not in ((1, W.shape[1]), (W.shape[0], 1)):
            raise misfit(path, f"scales of shape {tuple(scales.shape)}", W)
        if tuple(scales.shape) == (W.shape[0], 1) and base.has_bias(path):
            raise MergeRefused(
                f"{path} has a bias, which IA3 scales with the outputs: no LoRA does that.",
                hint="Layers of feedforward_modules, whose inputs are scaled, are converted with biases too.",
            )
        return W * scales - W


_OF_WEIGHTS: Mapping[str, tuple[str, tuple[str, ...], Callable[[PeftForms, BaseWeights, str, Tensors], Tensor]]] = {
    "OFT": ("OFT", ("oft_R",), PeftForms._oft),
    "BOFT": ("BOFT", ("boft_R", "boft_s"), PeftForms._boft),
    "IA3": ("IA3", ("ia3_l",), PeftForms._ia3),
}
"""Type → its title, the tensors of a module, and ΔW."""


_NAMES: Mapping[str, tuple[str, ...]] = {
    "ADALORA": ("lora_A", "lora_B", "lora_E", "ranknum"),
    "VERA": ("vera_lambda_b", "vera_lambda_d"),
    "RANKWISE_LQ_LORA": ("lora_A", "lora_B", "start_A", "start_B"),
    "LOHA": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LOKR": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
"""Type → what a module may have, of those whose ΔW is a pair."""


def check_names(path: str, title: str, tensors: Tensors, names: Collection[str]) -> None:
    """Raises MergeRefused: a module has more than its form reads."""
    others = sorted(tensors.keys() - set(names))
    if others:
        raise MergeRefused(f"{path} has {others[0]}, which is no part of a linear layer of {title}.")


def linear_weight(base: BaseWeights, path: str) -> Tensor:
    """W: (d_out, d_in). Raises MergeRefused: it is none of a linear layer."""
    W = base.of(path)
    if W.ndim != 2:
        raise MergeRefused(f"{path} is a convolution; only linear layers of this type are converted.")
    return W


def fits(path: str, W: Tensor, shape: tuple[int, ...]) -> None:
    """Raises MergeRefused: the base model's weight has another shape."""
    if tuple(W.shape) != shape:
        raise MergeRefused(f"{path}: the adapter is for a weight of {shape}, the base model has {tuple(W.shape)}.")


def misfit(path: str, found: str, W: Tensor) -> MergeRefused:
    """The error of an adapter that has something else than fits the weight."""
    return MergeRefused(f"{path}: the adapter has {found}, the weight of the base model is {tuple(W.shape)}.")


def _number(raw: Mapping[str, Any], name: str, default: float | None = None, *, positive: bool = False) -> float:
    return _checked(raw.get(name, default), name, positive)


def _checked(value: object, name: str, positive: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MergeRefused(f"{name} of the configuration is no number.")
    if positive and not value > 0:
        raise MergeRefused(f"{name} of the configuration is {value:g}; what is converted has it above 0.")
    return float(value)


def _pattern(raw: Mapping[str, Any], name: str, path: str, *, positive: bool = False) -> float:
    """`r` or `alpha` of a module: of its pattern, else of all."""
    field = {"r": "rank_pattern", "alpha": "alpha_pattern"}[name]
    pattern = raw.get(field) or {}
    if not isinstance(pattern, dict):
        raise MergeRefused(f"{field} of the configuration is no object.")
    found = PatternTable[object](field, pattern).lookup(path, None)
    return _number(raw, name, positive=positive) if found is None else _checked(found, f"{field} of {path}", positive)


def _release(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Major and minor number of the PEFT that wrote the configuration; those before 0.18 did not say."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", str(raw.get("peft_version")))
    return (0, 0) if found is None else tuple(map(int, found.groups()))
