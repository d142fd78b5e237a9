"""A merge into the base model: W + ΔW, written file by file in blocks of rows, so that no model is ever in memory."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from artifacts.adapter import TORCH_DTYPES, Adapter
from artifacts.errors import FieldError, MergeRefused, ShapeMismatch
from artifacts.model_folder import carried_files, write_json
from artifacts.safetensors_header import TensorInfo
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
from merge.model_layout import FLOATS, ModelLayout

MAX_ROUNDING = 0.2
"""How large rounding may be beside the change, ‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖ over all modules, unless it is forced."""

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
_NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BLOCK_ELEMENTS = 2**20
_COPY_BYTES = 2**24
_INDEX = "model.safetensors.index.json"
_NAMED = 20


@dataclass(frozen=True, slots=True)
class FoldedModule:
    """What became of one weight.

    Attributes:
        change: ‖ΔW‖ / ‖W‖.
        rounding: ‖round(W+ΔW) − (W+ΔW)‖ / ‖ΔW‖; None where ΔW is 0.
    """

    path: str
    tensor: str
    dtype: str
    change: float | None
    rounding: float | None


@dataclass(frozen=True, slots=True)
class FoldReport:
    """The whole model. `untied` names output layers that were stored apart since their embedding is another one now."""

    modules: tuple[FoldedModule, ...]
    rounding: float | None
    dtype: str
    untied: tuple[str, ...]
    size: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rounding": self.rounding,
            "largest_rounding": MAX_ROUNDING,
            "dtype": self.dtype,
            "untied": list(self.untied),
            "bytes": self.size,
            "modules": [asdict(module) for module in self.modules],
        }


def fold_into_base(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: Dtype = "auto",
    force: bool = False,
    progress: Callable[[float, str], None] | None = None,
) -> FoldReport:
    """Write the model in the folder `base` with the adapter's ΔW added to its weights into the new folder `out`.

    Memory holds one block of rows of one weight. An embedding that an adapter changes and that is also the output layer
    (tied) becomes two tensors: base and adapter together compute just that.

    Args:
        dtype: of the written weights; auto keeps that of each tensor.
        force: write it even if rounding is above `MAX_ROUNDING`.
        progress: called with the fraction done and a message; may raise to stop.

    Raises:
        MergeRefused: layers that the model lacks, a quantised model, or too much lost by rounding.
        ShapeMismatch: a layer with other dimensions than the adapter's.
        DiskFull
    """
    opened = Adapter.open(adapter)
    layout = ModelLayout(base)
    plan = _Plan.of(layout, opened)
    out.mkdir(parents=True)
    total = sum(path.stat().st_size for path in layout.files)
    done = 0
    sums: dict[str, _Sums] = {}
    for number, path in enumerate(layout.files, start=1):
        for moved in _write_file(plan, path, out / path.name, dtype, sums):
            done += moved
            if progress is not None:
                progress(min(done / total, 1.0), f"Adding to {path.name}, file {number} of {len(layout.files)}")
    report = plan.report(sums, dtype, sum(file.stat().st_size for file in out.iterdir()))
    if report.rounding is not None and report.rounding > MAX_ROUNDING and not force:
        raise MergeRefused(
            f"Rounding to the base model's precision would lose {report.rounding:.0%} of the size of the change "
            f"(at most {MAX_ROUNDING:.0%}).",
            hint="Set dtype to 'float32', or force to true.",
            errors=[FieldError("/dtype", f"loses {report.rounding:.0%} of the change by rounding")],
        )
    _carry(layout, plan, out, dtype)
    return report


@dataclass(slots=True)
class _Sums:
    """Squared Frobenius norms of a module's weight, change and rounding."""

    path: str
    dtype: str
    weight: float = 0.0
    change: float = 0.0
    rounding: float = 0.0


@dataclass(frozen=True)
class _Change:
    """What is added to a stored matrix: left·right, whose product is ΔW, or its transpose where it is stored so."""

    path: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class _Plan:
    """Which tensors change, and which are written anew."""

    layout: ModelLayout
    adapter: Adapter
    changed: Mapping[str, tuple[str, bool]]  # tensor → module of the adapter, transposed
    biases: Mapping[str, str]  # tensor → module of the adapter
    untied: Mapping[str, str]  # new tensor → the stored one that it is a copy of

    @classmethod
    def of(cls, layout: ModelLayout, adapter: Adapter) -> _Plan:
        changed: dict[str, tuple[str, bool]] = {}
        biases: dict[str, str] = {}
        offenders = []
        for path, module in adapter.modules.items():
            weight = layout.weight(path)
            if weight is None:
                offenders.append(FieldError(path, "the base model has no such layer"))
                continue
            changed[weight.name] = (path, weight.transposed)
            if module.bias_key:
                bias = layout.stored(weight.name.removesuffix("weight") + "bias")
                if bias is None or bias not in layout.tensors:
                    offenders.append(FieldError(path, "the adapter adds to a bias, which the layer does not have"))
                else:
                    biases[bias] = path
        tied = layout.tied
        touched = changed.keys() & (tied.keys() | set(tied.values()))
        untied = dict(tied) if touched else {}
        if offenders:
            raise MergeRefused(
                f"{len(offenders)} modules can not be merged into {layout.folder.name}: "
                f"{offenders[0].pointer}: {offenders[0].message}.",
                hint="Name the base model that the adapters were trained on.",
                errors=offenders[:_NAMED],
            )
        plan = cls(layout, adapter, changed, biases, untied)
        plan._check_shapes()
        return plan

    def info(self, name: str) -> TensorInfo:
        """The stored tensor that the written one of this name begins as."""
        return self.layout.tensors[self.untied.get(name, name)][1]

    def _check_shapes(self) -> None:
        offenders = []
        for name, (path, transposed) in self.changed.items():
            module, info = self.adapter.modules[path], self.info(name)
            needed = (module.d_in, module.d_out) if transposed else (module.d_out, module.d_in)
            rows = info.shape[0] if info.shape else 0
            found = (rows, info.elements // max(rows, 1))
            if found != needed:
                text = (
                    f"the adapter needs a weight of {needed[0]}×{needed[1]}, the base model has {found[0]}×{found[1]}"
                )
                offenders.append(FieldError(path, text))
            elif info.dtype not in FLOATS:
                offenders.append(
                    FieldError(path, f"its weight is stored as {info.dtype}, to which nothing can be added")
                )
        if offenders:
            raise ShapeMismatch(
                f"{len(offenders)} modules do not fit the base model: {offenders[0].pointer}: {offenders[0].message}.",
                hint="Name the base model that the adapters were trained on.",
                errors=offenders[:_NAMED],
            )

    def change(self, name: str) -> _Change | None:
        """What is added to this tensor, in float32."""
        if name not in self.changed:
            return None
        path, transposed = self.changed[name]
        factors = self.adapter[path]
        A, B = factors.A.float(), factors.B.float() * factors.scaling
        return _Change(path, A.T, B.T) if transposed else _Change(path, B, A)

    def bias(self, name: str) -> Tensor | None:
        """What is added to this vector, (d_out,)."""
        if name not in self.biases:
            return None
        module = self.adapter.modules[self.biases[name]]
        assert module.bias_key is not None
        return self.adapter.tensor(module.bias_key).float() * module.scaling

    def names(self, path: Path) -> list[str]:
        """Tensors of the written file: those of the file, and copies of its own that are tied no more."""
        stored = self.layout.files[path].tensors
        return [*stored, *(name for name, source in self.untied.items() if source in stored)]

    def report(self, sums: Mapping[str, _Sums], dtype: str, size: int) -> FoldReport:
        modules = tuple(
            FoldedModule(
                found.path,
                name,
                found.dtype,
                _ratio(found.change, found.weight),
                _ratio(found.rounding, found.change),
            )
            for name, found in sorted(sums.items(), key=lambda item: item[1].path)
        )
        rounding = _ratio(math.fsum(s.rounding for s in sums.values()), math.fsum(s.change for s in sums.values()))
        return FoldReport(modules, rounding, dtype, tuple(sorted(self.untied)), size)


def _ratio(above: float, below: float) -> float | None:
    return float(f"{math.sqrt(above / below):.6g}") if below > 0 else None


def _write_file(plan: _Plan, source: Path, target: Path, dtype: Dtype, sums: dict[str, _Sums]) -> Iterator[int]:
    """Write one file of weights; gives the bytes that were read, block by block."""
    header = plan.layout.files[source]
    entries = [
        TensorEntry(name, _stored_dtype(plan.info(name), dtype), plan.info(name).shape) for name in plan.names(source)
    ]
    with source.open("rb", buffering=0) as file, SafetensorsWriter(target, entries, header.metadata) as writer:
        for entry in entries:
            info = plan.info(entry.name)
            change, bias = plan.change(entry.name), plan.bias(entry.name)
            if change is None and bias is None and entry.dtype == info.dtype:
                yield from _copy(file.fileno(), info, writer, entry.name)
            else:
                found = None if change is None else sums.setdefault(entry.name, _Sums(change.path, entry.dtype))
                yield from _convert(file.fileno(), info, writer, entry, change, bias, found)


def _stored_dtype(info: TensorInfo, dtype: Dtype) -> str:
    return info.dtype if dtype == "auto" or info.dtype not in FLOATS else _NAMES[dtype]


def _copy(descriptor: int, info: TensorInfo, writer: SafetensorsWriter, name: str) -> Iterator[int]:
    size = info.end - info.begin
    for start in range(0, max(size, 1), _COPY_BYTES):
        data = os.pread(descriptor, min(_COPY_BYTES, size - start), info.begin + start)
        writer.write_part(name, start, memoryview(data))
        yield len(data)


def _convert(
    descriptor: int,
    info: TensorInfo,
    writer: SafetensorsWriter,
    entry: TensorEntry,
    change: _Change | None,
    bias: Tensor | None,
    sums: _Sums | None,
) -> Iterator[int]:
    """Rows of a tensor with what is added to them, in the dtype that is written."""
    rows = info.shape[0] if info.shape else 1
    width = info.elements // max(rows, 1)
    if not info.elements:
        writer.write_part(entry.name, 0, memoryview(b""))
        return
    row_bytes = (info.end - info.begin) // rows
    at_once = max(1, _BLOCK_ELEMENTS // width)
    written = 0
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        data = bytearray(os.pread(descriptor, count * row_bytes, info.begin + first * row_bytes))
        block = torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(count, width)
        wanted = block.double() if info.dtype == "F64" else block.float()
        if change is not None:
            delta = (change.left[first : first + count] @ change.right).to(wanted.dtype)
            _add_squares(sums, weight=wanted, change=delta)
            wanted = wanted + delta
        if bias is not None:
            wanted = wanted + bias[first : first + count, None]
        result = wanted.to(TORCH_DTYPES[entry.dtype])
        if change is not None:
            _check_finite(result, entry)
            _add_squares(sums, rounding=result.to(wanted.dtype) - wanted)
        out = result.contiguous().view(-1).view(torch.uint8).numpy().data
        writer.write_part(entry.name, written, out)
        written += out.nbytes
        yield len(data)


def _add_squares(sums: _Sums | None, **blocks: Tensor) -> None:
    assert sums is not None
    for name, block in blocks.items():
        setattr(sums, name, getattr(sums, name) + float(block.double().square().sum()))


def _check_finite(block: Tensor, entry: TensorEntry) -> None:
    if not bool(torch.isfinite(block).all()):
        raise MergeRefused(
            f"{entry.name} holds NaN or infinite numbers after the change, in {entry.dtype}.",
            hint="Set dtype to 'float32' if the numbers are too large for the precision.",
            errors=[FieldError("/dtype", f"{entry.name} is not finite")],
        )


def _carry(layout: ModelLayout, plan: _Plan, out: Path, dtype: Dtype) -> None:
    """Configuration, tokenizer and index: copied, and changed where the weights are other ones now."""
    for path in carried_files(layout.folder):
        if not path.name.endswith(".index.json") or path.name == _INDEX:
            shutil.copyfile(path, out / path.name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if plan.untied:
        config["tie_word_embeddings"] = False
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    write_json(out / "config.json", config)
    if (out / _INDEX).is_file():
        index = json.loads((out / _INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {name: path.name for path in layout.files for name in plan.names(path)}
        sizes = [
            TensorEntry(name, _stored_dtype(plan.info(name), dtype), plan.info(name).shape).size
            for path in layout.files
            for name in plan.names(path)
        ]
        index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(sizes)}
        write_json(out / _INDEX, index)
