"""An adapter of another type as a plain LoRA: exactly where its form allows it, else the nearest one of a rank."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.base_model import Fingerprint
from artifacts.errors import FieldError, FileBroken, MergeRefused
from artifacts.export import ExportedModule, PeftWriter, lora_config
from artifacts.layout import AdapterLayout, read_layout
from artifacts.manifest import LoraModule
from artifacts.refusals import lasting
from merge.base_weights import BaseWeights
from merge.convertible import MAX_RESULT_BYTES, lost
from merge.foreign_forms import ForeignForm, forms_of
from merge.nearest_lora import ConvertedModule, Nearest, of_factors, of_matrix, relative
from merge.peft_forms import Change, PeftForms

_NAMED = 20

Progress = Callable[[float, str], None]


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
        base: folder of the base model, for types whose ΔW depends on its weights (DoRA, OFT …).
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
    changes = _changes_of(layout, fingerprint, base, unpacked)
    paths = changes.paths()
    found: dict[str, _Converted] = {}
    largest = sides = 0
    for number, path in enumerate(paths):
        if progress is not None:
            progress(0.9 * number / len(paths), f"Converting {number + 1} of {len(paths)} modules")
        found[path] = _nearest(changes, layout, path, rank)
        A, B = found[path].found.pair
        largest, sides = max(largest, A.shape[0]), sides + A.shape[1] + B.shape[0]
        if 4 * largest * sides > MAX_RESULT_BYTES:  # every module is written with the largest rank
            raise MergeRefused(
                f"As a LoRA of rank {largest} the first {number + 1} of {len(paths)} modules take more than "
                f"{MAX_RESULT_BYTES} bytes.",
                hint="Ask for a smaller rank.",
                errors=[FieldError("/rank", "makes the result too large")],
            )
    modules = tuple(item.found.told for item in found.values())
    error = math.fsum(item.found.error for item in found.values())
    energy = math.fsum(item.found.energy for item in found.values())
    exact = all(item.exact_rank is not None and item.rank == item.exact_rank for item in modules)
    report = ConversionReport(layout.config.method, largest, exact, relative(error, energy), modules)
    if max_error is not None and report.relative_error > max_error:
        raise _too_lossy(report, max_error)
    _write(layout, found, largest, out, lineage, unpacked)
    return report


@dataclass(frozen=True, slots=True)
class _Converted:
    """A module, and (c_in, kh, kw) of a convolution, () of a linear layer."""

    found: Nearest
    kernel: tuple[int, ...]


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
class _ForeignForms:
    """The modules of a file that is not PEFT's."""

    forms: Mapping[str, Callable[[], ForeignForm]]
    base: BaseWeights | None

    def paths(self) -> list[str]:
        return sorted(self.forms)

    def change(self, path: str) -> Change:
        return self.forms[path]().change(self.base)


def _changes_of(
    layout: AdapterLayout, fingerprint: Fingerprint | None, base: Path | None, unpacked: str | None
) -> PeftForms | _ForeignForms:
    weights = None if base is None else BaseWeights(base)
    changes: PeftForms | _ForeignForms
    if layout.reading is not None:
        changes = _ForeignForms(forms_of(layout.reading, Adapter(layout)), weights)
    else:
        changes = PeftForms.of(layout, fingerprint, weights, unpacked=unpacked is not None)
    problem = lost(lasting(layout.refusals))
    if problem is not None:
        raise MergeRefused(f"{problem[0].upper()}{problem[1:]}.")
    return changes


def _nearest(changes: PeftForms | _ForeignForms, layout: AdapterLayout, path: str, rank: int | None) -> _Converted:
    try:
        change = changes.change(path)
    except (KeyError, IndexError, RuntimeError) as error:
        raise FileBroken(f"{path} does not have the tensors of {layout.config.method}: {error}.") from error
    if isinstance(change.value, tuple):
        found = of_factors(path, *change.value, rank)
    else:
        found = of_matrix(path, change.value, rank, change.default_rank)
    return _Converted(found, change.kernel)


def _write(
    layout: AdapterLayout,
    found: Mapping[str, _Converted],
    rank: int,
    out: Path,
    lineage: Mapping[str, Any] | None,
    unpacked: str | None,
) -> None:
    exported = [ExportedModule(_described(path, *item.found.pair, item.kernel), rank) for path, item in found.items()]
    config = lora_config(
        rank=rank,
        target_modules=found,
        base_model=unpacked or _original(layout.config.raw) or layout.config.base_model,
        revision=layout.config.revision,
        task_type=layout.config.task_type,
        fan_in_fan_out=layout.config.fan_in_fan_out or bool(layout.config.raw.get("fan_in_fan_out")),
    )
    with PeftWriter(out, exported, config, dtype="F32", lineage=json.loads(json.dumps(lineage))) as writer:
        for path, item in found.items():
            A, B = item.found.pair
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
