"""An adapter of another type as a plain LoRA: exactly where its form allows it, else the nearest one of a rank."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts import low_rank_forms
from artifacts.adapter import TORCH_DTYPES, Adapter
from artifacts.algebra import core_svd, gram, squared_norm, truncated_factors
from artifacts.base_model import Fingerprint, sides_of
from artifacts.errors import FieldError, FileBroken, MergeRefused
from artifacts.export import ExportedModule, PeftWriter, lora_config
from artifacts.layout import AdapterLayout, read_layout
from artifacts.low_rank_forms import Pair
from artifacts.manifest import LoraModule
from artifacts.peft_patterns import PatternTable
from merge.convertible import MAX_EXACT_RANK, MAX_RESULT_BYTES
from merge.foreign_forms import ForeignForm, forms_of
from merge.form_sizes import form_size
from merge.model_layout import ModelLayout

PREFIX = "base_model.model."
_OVERSAMPLED, _ITERATIONS = 8, 4
_NAMED = 20

Tensors = Mapping[str, Tensor]
Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """One module. `exact_rank` is the rank of its form (None: full); `relative_error` is ‖ΔW' − ΔW‖/‖ΔW‖."""

    path: str
    rank: int
    exact_rank: int | None
    relative_error: float


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The whole adapter. `exact` means to rounding of float32."""

    source: str
    rank: int
    exact: bool
    relative_error: float
    modules: tuple[ConvertedModule, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "from": self.source,
            "to": "lora",
            "rank": self.rank,
            "exact": self.exact,
            "relative_error": self.relative_error,
            "modules": [asdict(module) for module in self.modules],
        }


def convert_to_lora(
    directory: Path,
    out: Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    fingerprint: Fingerprint | None = None,
    base: Path | None = None,
    unpacked: str | None = None,
    lineage: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the adapter in `directory` as a plain LoRA with scaling 1, in float32, into the new folder `out`.

    Args:
        rank: of the result, capped for each module at the rank of its form; None keeps the form exactly.
        max_error: largest ‖ΔW' − ΔW‖/‖ΔW‖ of the whole adapter that will do; None: any.
        fingerprint: the layers of the base model, for types whose files do not tell their sides (VeRA).
        base: folder of the base model, for types whose ΔW depends on its weights (DoRA).
        unpacked: of an LQ-LoRA, the name of the dense model that its packed weights became: the LoRA is then for that
            one, scaling·B·A as it was trained, and not the change of the training.
        progress: called with the fraction done and a message; may raise to stop.

    Raises:
        MergeRefused: a type or a form that is not converted, an exact form of too large a rank, a base model that is
            needed and not given or does not fit, or more is lost than `max_error` allows.
        FileBroken: tensors that the type's form does not have.
        DiskFull
    """
    layout = read_layout(directory)
    source = _Source.of(layout, fingerprint, base, rank, unpacked)
    paths = source.paths()
    found: dict[str, tuple[Pair, ConvertedModule, tuple[float, float]]] = {}
    largest = sides = 0
    for number, path in enumerate(paths):
        if progress is not None:
            progress(0.9 * number / len(paths), f"Converting {number + 1} of {len(paths)} modules")
        found[path] = source.convert(path)
        (A, B), item, _ = found[path]
        largest, sides = max(largest, item.rank), sides + A.shape[1] + B.shape[0]
        if 4 * largest * sides > MAX_RESULT_BYTES:  # every module is written with the largest rank
            raise MergeRefused(
                f"As a LoRA of rank {largest} the first {number + 1} of {len(paths)} modules take more than "
                f"{MAX_RESULT_BYTES} bytes.",
                hint="Ask for a smaller rank.",
                errors=[FieldError("/rank", "makes the result too large")],
            )
    error = math.fsum(item[2][0] for item in found.values())
    energy = math.fsum(item[2][1] for item in found.values())
    modules = tuple(item for _, item, _ in found.values())
    exact = all(item.exact_rank is not None and item.rank == item.exact_rank for item in modules)
    report = ConversionReport(layout.config.method, largest, exact, _relative(error, energy), modules)
    if max_error is not None and report.relative_error > max_error:
        raise _too_lossy(report, max_error)
    kernels = {path: form.kernel for path, form in source.foreign.items()}
    _write(layout, {path: pair for path, (pair, _, _) in found.items()}, kernels, largest, out, lineage, unpacked)
    return report


def _too_lossy(report: ConversionReport, max_error: float) -> MergeRefused:
    """The error, with the modules that lose most."""
    worst = sorted(report.modules, key=lambda module: -module.relative_error)[:_NAMED]
    told = f"a LoRA of rank {report.rank} loses {report.relative_error:.3g} of the change, {max_error:g} is allowed"
    return MergeRefused(
        f"A{told[1:]}.",
        hint="Ask for a larger rank, or allow more with max_error.",
        errors=[
            FieldError("/max_error", f"{module.path}: {module.relative_error:.3g} at rank {module.rank}")
            for module in worst
        ],
    )


@dataclass(frozen=True)
class _Source:
    """An adapter of another type, and what is known of its base model."""

    layout: AdapterLayout
    adapter: Adapter
    modules: Mapping[str, Tensors]  # path → name within the module → tensor
    shared: Tensors  # that belong to no module
    sides: Callable[[str], tuple[int, int] | None]
    base: ModelLayout | None
    rank: int | None
    unpacked: str | None = None
    foreign: Mapping[str, ForeignForm] = field(default_factory=dict)  # of a file that is not PEFT's

    @classmethod
    def of(
        cls,
        layout: AdapterLayout,
        fingerprint: Fingerprint | None,
        base: Path | None,
        rank: int | None,
        unpacked: str | None,
    ) -> _Source:
        adapter = Adapter(layout)
        if layout.reading is not None:
            forms = forms_of(layout.reading, adapter)
            named = {path: form.tensors for path, form in forms.items()}
            return cls(layout, adapter, named, {}, sides_of(fingerprint or ()), None, rank, foreign=forms)
        modules: dict[str, dict[str, Tensor]] = {}
        shared: dict[str, Tensor] = {}
        for key in layout.header.tensors:
            path, _, name = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            tensor = adapter.tensor(key).float()
            if not bool(torch.isfinite(tensor).all()):
                raise MergeRefused(f"{key} holds NaN or infinite numbers.")
            if key.startswith(PREFIX):
                modules.setdefault(path, {})[name] = tensor
            else:
                shared[name] = tensor
        if not modules:
            raise FileBroken("The adapter holds no module.")
        whole = layout.config.modules_to_save
        if whole:
            raise MergeRefused(
                f"The adapter holds modules that were trained whole: {', '.join(whole[:_NAMED])}.",
                hint="They can not become part of a LoRA.",
            )
        sides = sides_of(fingerprint or ())
        opened = None if base is None else ModelLayout(base)
        return cls(layout, adapter, modules, shared, sides, opened, rank, unpacked)

    def paths(self) -> list[str]:
        return sorted(self.modules)

    def convert(self, path: str) -> tuple[Pair, ConvertedModule, tuple[float, float]]:
        """(A, B), what is told of the module, and the squared norms of its error and of its ΔW."""
        try:
            if self.layout.config.method == "dora":
                return self._dora(path)
            A, B = self._form(path, self.modules[path])
        except (KeyError, IndexError, RuntimeError) as error:
            raise FileBroken(f"{path} does not have the tensors of {self.layout.config.method}: {error}.") from error
        return self._cut(path, A, B)

    def _form(self, path: str, tensors: Tensors) -> Pair:
        if path in self.foreign:
            return self.foreign[path].pair()
        raw = self.layout.config.raw
        kind = self.layout.config.peft_type
        if any(tensor.ndim > 2 for tensor in tensors.values()):
            raise MergeRefused(f"{path} is a convolution; only linear layers of {kind} are converted.")
        if kind == "ADALORA":
            return self._adalora(path, tensors)
        if kind == "VERA":
            return self._vera(path, tensors)
        if kind == "RANKWISE_LQ_LORA":
            scaling = float(raw["lora_alpha"]) / float(raw["r"])
            trained, start = ((tensors[f"{name}_A"], tensors[f"{name}_B"]) for name in ("lora", "start"))
            if self.unpacked is not None:
                return trained[0], trained[1] * scaling
            return low_rank_forms.difference(trained, start, scaling)
        scaling = _pattern(raw, "alpha", path) / _pattern(raw, "r", path)
        if kind in ("LOHA", "LOKR"):
            form_size(path, kind.lower(), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if kind == "LOHA":
            w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return low_rank_forms.loha(w1_a, w1_b, w2_a, w2_b, scaling)
        if kind == "LOKR":
            parts = [
                low_rank_forms.factored(tensors.get(name), tensors.get(f"{name}_a"), tensors.get(f"{name}_b"))
                for name in ("lokr_w1", "lokr_w2")
            ]
            return low_rank_forms.lokr(parts[0], parts[1], scaling)
        raise MergeRefused(f"Adapters of the type {kind} are not converted to LoRA.")

    def _adalora(self, path: str, tensors: Tensors) -> Pair:
        raw = self.layout.config.raw
        A, B, E = (tensors[f"lora_{name}"] for name in "ABE")
        # As PEFT computes it: by the rank that the training began with, whatever has been pruned since.
        return low_rank_forms.adalora(A, B, E, float(raw["lora_alpha"]) / (float(raw["init_r"]) + 1e-5))

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
        if b.shape[0] != sides[0] or self.shared["vera_A"].shape[1] < sides[1]:
            raise MergeRefused(f"{path} of the base model has other sides than the adapter.")
        return low_rank_forms.vera(self.shared["vera_A"], self.shared["vera_B"], d, b, sides[1])

    def _cut(self, path: str, A: Tensor, B: Tensor) -> tuple[Pair, ConvertedModule, tuple[float, float]]:
        if A.shape[0] > min(A.shape[1], B.shape[0]):  # then the matrix itself is smaller than its factors
            A, B = low_rank_forms.factored(B @ A, None, None)
        exact = A.shape[0]
        if exact == 0:
            A, B, exact = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1), 1
        gram_A, gram_B = gram(A), gram(B, columns=True)
        ones = torch.ones(exact, dtype=torch.float64)
        energy = squared_norm(torch.diag(ones), gram_A, gram_B)
        wanted = exact if self.rank is None else min(self.rank, exact)
        if self.rank is None and exact > MAX_EXACT_RANK:
            raise MergeRefused(
                f"{path} is a LoRA of rank {exact} exactly, which is above {MAX_EXACT_RANK}.",
                hint="Ask for a rank: the nearest LoRA of that rank is made, and its error told.",
                errors=[FieldError("/rank", f"the exact rank of {path} is {exact}")],
            )
        if wanted == exact:
            return (A, B), ConvertedModule(path, exact, exact, 0.0), (0.0, energy)
        svd = core_svd(A, B, ones, gram_A, gram_B)
        error = float(svd.values[wanted:].square().sum())
        pair = truncated_factors(A, B, svd, wanted)
        return pair, ConvertedModule(path, wanted, exact, _relative(error, energy)), (error, energy)

    def _dora(self, path: str) -> tuple[Pair, ConvertedModule, tuple[float, float]]:
        """ΔW = diag(m / ‖W + s·B·A‖)·(W + s·B·A) − W (DoRA, arXiv:2402.09353, eq. 5), norms of rows; cut by a
        randomised SVD with a fixed seed (arXiv:0909.4061)."""
        config = self.layout.config
        if self.base is None:
            raise MergeRefused(
                "What a DoRA adapter adds depends on the weights of its base model.",
                hint="Register the base model from a folder of the server (POST /models), and name it as base_model.",
                errors=[FieldError("/base_model", "is needed")],
            )
        module = next((item for item in self.layout.modules if item.path == path), None)
        tensors = self.modules[path]
        A, B, magnitude = tensors["lora_A"], tensors["lora_B"], tensors["lora_magnitude_vector"].flatten()
        if module is None or A.ndim != 2:
            raise MergeRefused(f"{path} is no linear layer; only those of DoRA are converted.")
        W = _base_weight(self.base, path, (B.shape[0], A.shape[1]))
        directed = W + config.scaling_for(path, A.shape[0]) * (B @ A)
        delta = directed * (magnitude / directed.norm(dim=1).clamp_min(torch.finfo(W.dtype).tiny))[:, None] - W
        wanted = min(self.rank or 2 * A.shape[0], *delta.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            size = min(wanted + _OVERSAMPLED, *delta.shape)
            U, S, V = torch.svd_lowrank(delta, q=size, niter=_ITERATIONS)
        root = S[:wanted].sqrt()
        pair = (V[:, :wanted] * root).T.contiguous(), (U[:, :wanted] * root).contiguous()
        energy = float(delta.double().square().sum())
        error = float((delta - pair[1] @ pair[0]).double().square().sum())
        full = wanted if wanted == min(delta.shape) else None
        return pair, ConvertedModule(path, wanted, full, _relative(error, energy)), (error, energy)


def _base_weight(layout: ModelLayout, path: str, shape: tuple[int, int]) -> Tensor:
    """W of a linear layer, (d_out, d_in), in float32."""
    weight = layout.weight(path)
    entry = None if weight is None else layout.tensors.get(layout.tied.get(weight.name, weight.name))
    if weight is None or entry is None or entry[1].dtype not in TORCH_DTYPES:
        raise MergeRefused(f"The base model has no layer {path} whose weight could be read.")
    file, info = entry
    with file.open("rb", buffering=0) as opened:
        data = bytearray(os.pread(opened.fileno(), info.end - info.begin, info.begin))
    W = torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape).float()
    W = W.T.contiguous() if weight.transposed else W
    if tuple(W.shape) != shape:
        raise MergeRefused(f"{path}: the adapter is for a weight of {shape}, the base model has {tuple(W.shape)}.")
    return W


def _pattern(raw: Mapping[str, Any], name: str, path: str) -> float:
    """`r` or `alpha` of a module: of its pattern, else of all."""
    field = {"r": "rank_pattern", "alpha": "alpha_pattern"}[name]
    pattern = raw.get(field) or {}
    value = PatternTable(field, pattern).lookup(path, raw[name])
    return float(value)


def _write(
    layout: AdapterLayout,
    pairs: Mapping[str, Pair],
    kernels: Mapping[str, tuple[int, ...]],
    rank: int,
    out: Path,
    lineage: Mapping[str, Any] | None,
    unpacked: str | None,
) -> None:
    exported = [ExportedModule(_described(path, *pair, kernels.get(path, ())), rank) for path, pair in pairs.items()]
    config = lora_config(
        rank=rank,
        target_modules=pairs,
        base_model=unpacked or _original(layout.config.raw) or layout.config.base_model,
        revision=layout.config.revision,
        task_type=layout.config.task_type,
        fan_in_fan_out=layout.config.fan_in_fan_out or bool(layout.config.raw.get("fan_in_fan_out")),
    )
    with PeftWriter(out, exported, config, dtype="F32", lineage=json.loads(json.dumps(lineage))) as writer:
        for path, (A, B) in pairs.items():
            missing = rank - A.shape[0]
            A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
            B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
            writer.write(path, A.contiguous(), B.contiguous())


def _original(raw: Mapping[str, Any]) -> str | None:
    """The base model that was quantised, of an adapter whose difference is for that one."""
    found = raw.get("quantised_from")
    name = found.get("name") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _described(path: str, A: Tensor, B: Tensor, kernel: tuple[int, ...]) -> LoraModule:
    """`kernel`: (c_in, kh, kw) of a convolution, () of a linear layer."""
    a_shape, b_shape = tuple(A.shape), tuple(B.shape)
    if kernel:
        a_shape, b_shape = (A.shape[0], *kernel), (*B.shape, 1, 1)
    return LoraModule(
        path=path, kind="conv" if kernel else "linear", a_key="", b_key="", rank=A.shape[0], alpha=1.0, scaling=1.0,
        d_in=A.shape[1], d_out=B.shape[0], a_shape=a_shape, b_shape=b_shape, dtype="F32",
    )  # fmt: skip


def _relative(error: float, energy: float) -> float:
    return float(f"{math.sqrt(max(error, 0.0) / energy):.6g}") if energy > 0 else 0.0
