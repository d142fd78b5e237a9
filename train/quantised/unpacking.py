"""A base model in a few bits becomes an ordinary one: packed weights are written as the numbers that they stand for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from artifacts.adapter import TORCH_DTYPES
from artifacts.errors import BaseMismatch, FieldError, FileBroken, RequestInvalid
from artifacts.model_folder import carried_files, write_json
from artifacts.quantised_base import NOTES_NAME, START_NAME, packed_layers, quantisation_of
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
from train.quantised.block_format import CODEBOOK, DTYPE_NAMES, BlockFormat, numel_of
from train.quantised.double_quantisation import DTYPES, PackedMatrix, tensor_shapes, unpacked
from train.quantised.engine import WEIGHTS_NAME
from train.quantised.source_weights import FLOATS, SourceWeights

Dtype = Literal["float32", "bfloat16", "float16"]
_NAMED = 20


@dataclass(frozen=True, slots=True)
class UnpackingReport:
    """What became of the packed weights.

    Attributes:
        rounding: ‖round(Q) − Q‖ / ‖Q‖ over all of them; 0 in float32.
        size: bytes of the folder.
    """

    matrices: int
    dtype: str
    rounding: float
    size: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"matrices": self.matrices, "dtype": self.dtype, "rounding": self.rounding, "bytes": self.size}


@torch.no_grad()
def unpack_base(
    folder: Path,
    out: Path,
    *,
    dtype: Dtype = "float32",
    identities: Mapping[str, str] | None = None,
    progress: Callable[[float, str], None],
) -> UnpackingReport:
    """Write the packed model in `folder` into the new folder `out` with Q in place of its codes, and nothing added.

    Every program that reads the original model reads `out`. One matrix at a time is in memory.

    Args:
        dtype: of all weights that are written; in float32 they are Q exactly.
        identities: path → SHA-256 of packed weights (`PackedMatrix.identity`), which must be those of the model.
        progress: called with the fraction done and a message; may raise to stop.

    Raises:
        BaseMismatch: the packed weights are other ones than `identities` names.
        RequestInvalid: the model is not packed, or by an unknown codebook; a weight is too large for the dtype.
        FileBroken: its tensors are not those that its configuration tells of.
        DiskFull
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = SourceWeights(folder)
    matrices = _Packed.of(weights, quantisation_of(config))
    if identities is not None:
        _check_identities(matrices, identities)
    out.mkdir(parents=True)
    entries = [TensorEntry(f"{path}.weight", DTYPE_NAMES[dtype], shape) for path, shape in matrices.sides.items()]
    kept = matrices.others()
    lost = energy = 0.0
    with SafetensorsWriter(
        out / WEIGHTS_NAME, [*entries, *(entry(dtype) for entry in kept)], {"format": "pt"}
    ) as writer:
        for number, path in enumerate(matrices.sides):
            progress(number / len(matrices.sides), f"unpacking {path}, {number + 1} of {len(matrices.sides)}")
            exact = unpacked(matrices.matrix(path))
            written = _cast(exact, dtype, f"{path}.weight")
            writer.write(f"{path}.weight", written)
            energy += float(exact.double().square().sum())
            lost += float((written.float() - exact).double().square().sum())
        for entry in kept:
            for place, piece in entry.pieces(weights, dtype):
                writer.write_part(entry.name, place, piece)
    _write_rest(folder, out, config, dtype)
    rounding = float(f"{math.sqrt(lost / energy):.6g}") if energy > 0 else 0.0
    return UnpackingReport(len(matrices.sides), dtype, rounding, sum(path.stat().st_size for path in out.iterdir()))


@dataclass(frozen=True)
class _Kept:
    """A tensor that was never packed."""

    name: str
    stored: str
    shape: tuple[int, ...]

    def __call__(self, dtype: Dtype) -> TensorEntry:
        return TensorEntry(self.name, DTYPE_NAMES[dtype] if self.stored in FLOATS else self.stored, self.shape)

    def pieces(self, weights: SourceWeights, dtype: Dtype) -> Iterator[tuple[int, memoryview]]:
        """Its bytes in the dtype that is written, with the place of each piece among them."""
        if self.stored not in FLOATS or self.stored == DTYPE_NAMES[dtype]:
            yield from weights.pieces(self.name)
            return
        place = 0
        for _, piece in weights.pieces(self.name):
            values = (
                torch.frombuffer(bytearray(piece), dtype=TORCH_DTYPES[self.stored]) if len(piece) else torch.empty(0)
            )
            data = _cast(values, dtype, self.name).view(torch.uint8).numpy().data
            yield place, data
            place += data.nbytes


@dataclass(frozen=True)
class _Packed:
    """The packed matrices of a folder. `sides`: path → (d_out, d_in), sorted."""

    weights: SourceWeights
    sides: Mapping[str, tuple[int, int]]
    forms: Mapping[str, BlockFormat]

    @classmethod
    def of(cls, weights: SourceWeights, quantisation: Mapping[str, Any] | None) -> _Packed:
        sides = dict(sorted(packed_layers(quantisation).items()))
        if quantisation is None or not sides:
            problem = "its weights are not packed"
            raise RequestInvalid(
                f"The base model can not be unpacked: {problem}.", errors=[FieldError("/model", problem)]
            )
        if quantisation.get("codebook") != CODEBOOK:
            problem = (
                f"its codebook {str(quantisation.get('codebook'))[:40]!r} is not known; this version has {CODEBOOK}"
            )
            raise RequestInvalid(
                f"The base model can not be unpacked: {problem}.", errors=[FieldError("/model", problem)]
            )
        try:
            forms = {path: BlockFormat.of(quantisation["layers"][path]["format"]) for path in sides}
        except (KeyError, TypeError, ValueError) as error:
            raise FileBroken(f"The configuration of the packed base model is not whole: {error}.") from error
        found = cls(weights, sides, forms)
        for path in sides:
            found._check(path)
        return found

    def others(self) -> list[_Kept]:
        parts = {f"{path}.{name}" for path in self.sides for name in tensor_shapes(1, self.forms[path])}
        return [
            _Kept(name, info.dtype, info.shape)
            for name, (path, info) in self.weights.tensors.items()
            if name not in parts and path.name != START_NAME
        ]

    def matrix(self, path: str) -> PackedMatrix:
        form = self.forms[path]
        parts = {name: self.weights.tensor(f"{path}.{name}") for name in tensor_shapes(1, form)}
        return PackedMatrix(**parts, shape=self.sides[path], form=form)

    def _check(self, path: str) -> None:
        form, numel = self.forms[path], numel_of(self.sides[path])
        dtypes = {"scale2": DTYPE_NAMES[form.scale_dtype], "offset": "F32"}
        for name, shape in tensor_shapes(numel, form).items():
            _, info = self.weights.tensors.get(f"{path}.{name}", (None, None))
            if info is None or info.shape != shape or info.dtype != dtypes.get(name, "U8") or not form.fits(numel):
                raise FileBroken(f"{path}.{name} of the packed base model is not what its configuration tells of.")


def _check_identities(matrices: _Packed, identities: Mapping[str, str]) -> None:
    faults = []
    for path, wanted in identities.items():
        if path not in matrices.sides:
            faults.append(FieldError(path, "the model has no such packed layer"))
        elif matrices.matrix(path).identity() != wanted:
            faults.append(FieldError(path, "its packed weight is not the one that the adapter was trained on"))
    if faults or not identities:
        first = f"{faults[0].pointer}: {faults[0].message}" if faults else "it names no packed layer"
        raise BaseMismatch(f"The adapter is not for this model: {first}.", errors=faults[:_NAMED])


def _cast(values: Tensor, dtype: Dtype, name: str) -> Tensor:
    found = values.to(DTYPES[dtype])
    if dtype == "float16" and bool(found.isinf().any()) and not bool(values.isinf().any()):
        problem = f"{name} has numbers that are too large for {dtype}"
        raise RequestInvalid(f"{problem}.", hint="Take bfloat16 or float32.", errors=[FieldError("/dtype", problem)])
    return found


def _write_rest(folder: Path, out: Path, config: Mapping[str, Any], dtype: Dtype) -> None:
    """Configuration and tokenizer; nothing of the packing."""
    for path in carried_files(folder):
        if not path.name.endswith(".index.json") and path.name not in (NOTES_NAME, "config.json"):
            shutil.copyfile(path, out / path.name)
    gone = ("quantization_config", "torch_dtype")
    write_json(out / "config.json", {key: value for key, value in config.items() if key not in gone} | {"dtype": dtype})
