"""A base model in, the same model in a few bits out: matrices chosen, decomposed one by one, and written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts.errors import FieldError, RequestInvalid
from artifacts.model_folder import carried_files, write_json
from artifacts.quantised_base import METHOD, NOTES_NAME, START_NAME, quantisation_of
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
from train.options.quantisation import QuantisationOptions
from train.quantised.block_format import CODEBOOK, DTYPE_NAMES, BlockFormat, first_that_fits, numel_of
from train.quantised.decomposition import Decomposition, decompose
from train.quantised.double_quantisation import packed, rounded, tensor_shapes
from train.quantised.fisher_weights import Fisher
from train.quantised.report import MatrixReport, QuantisationReport, relative_error
from train.quantised.search import Subject, check_formats, choose_formats, low_rank_factors
from train.quantised.source_weights import SourceWeights
from train.targets import resolve_targets

WEIGHTS_NAME = "model.safetensors"
SEARCHED = 0.75
"""Where the trials of formats end on the progress bar, with a budget."""

Progress = Callable[[float, str], None]


def quantise_base(
    source: Path,
    out: Path,
    options: QuantisationOptions,
    *,
    progress: Progress,
    device: str = "cpu",
    fisher: Fisher | None = None,
    notes: Mapping[str, Any] | None = None,
) -> QuantisationReport:
    """Write the model in the folder `source` into the new folder `out`, its linear layers as Q + L1·L2.

    `from_pretrained` loads `out` with packed weights once `train.quantised.loading` is imported; L1 and L2 are in a
    file beside them (`artifacts.quantised_base.START_NAME`). One matrix at a time is in memory. The same inputs give
    the same bytes on one kind of machine.

    Args:
        progress: called with the fraction done and a message; may raise to stop.
        fisher: of every quantised layer; it weighs the errors.
        notes: what else the folder shall say of its origin.

    Raises:
        RequestInvalid: layers that do not exist or do not fit, a budget that is too small, a model that is quantised
            already, weights that are no numbers.
        DiskFull
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if quantisation_of(config) is not None:
        problem = "the base model is quantised already"
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/model", problem)])
    weights = SourceWeights(source)
    sides = quantised_layers(weights, options)

    numbers = {path: number for number, path in enumerate(sides)}

    def read(path: str) -> Subject:
        measure = None if fisher is None else fisher.values[path].to(device)
        felt = measure is not None and bool(measure.any())
        heuristic = "two-sided" if fisher is None else fisher.heuristic
        weight = weights.weight(path).to(device)
        return Subject(path, numbers[path], weight, measure if felt else None, heuristic)

    choice, first = None, 0.0
    if options.budget_bits is not None:
        choice = choose_formats(sides, options, read, lambda part, text: progress(SEARCHED * part, text))
        forms, first = choice.formats, SEARCHED
    else:
        forms = {path: first_that_fits(numel_of(shape), options.formats) for path, shape in sides.items()}
    out.mkdir(parents=True)
    matrices = []
    entries = [*_packed_entries(sides, forms), *_kept_entries(weights, sides)]
    with (
        SafetensorsWriter(out / WEIGHTS_NAME, entries, {"format": "pt"}) as writer,
        SafetensorsWriter(out / START_NAME, _factor_entries(sides, options.rank), {"format": "pt"}) as factors,
    ):
        for number, path in enumerate(sides):
            done = first + (1 - first) * number / len(sides)
            progress(done, f"quantising {path}, {number + 1} of {len(sides)}")
            subject = read(path)
            found = _decompose(subject, forms[path], options)
            matrix = packed(found.quantised, forms[path])
            for name in tensor_shapes(1, forms[path]):
                writer.write(f"{path}.{name}", getattr(matrix, name))
            factors.write(f"{path}.L1", found.left)
            factors.write(f"{path}.L2", found.right)
            matrices.append(_told(subject, forms[path], found, matrix.counted_bytes, fisher is not None))
        for entry in _kept_entries(weights, sides):
            for place, piece in weights.pieces(entry.name):
                writer.write_part(entry.name, place, piece)
    _write_rest(source, out, config, sides, forms, options, notes or {}, matrices)
    dense = sum(info.end - info.begin for info in (weights.tensors[f"{path}.weight"][1] for path in sides))
    told = None if fisher is None else {"heuristic": fisher.heuristic, **fisher.notes}
    size = sum(path.stat().st_size for path in out.iterdir())
    return QuantisationReport(matrices, options.rank, dense, size, choice, options.budget_bits, told)


def quantised_layers(weights: SourceWeights, options: QuantisationOptions) -> dict[str, tuple[int, int]]:
    """Path → (d_out, d_in) of the layers that are meant, sorted.

    Raises:
        RequestInvalid: a name that no linear layer has, a rank that is too large, a layer that fits no format.
    """
    targets = resolve_targets(weights.linear(), options.target_modules)
    sides = {target.path: (target.d_out, target.d_in) for target in targets}
    smallest = min(sides, key=lambda path: min(sides[path]))
    limit = min(sides[smallest]) - 1
    if options.rank > limit:
        problem = f"rank {options.rank} is above {limit}, one below the smaller side of {smallest}"
        raise RequestInvalid(
            f"R{problem[1:]}.",
            hint=f"Take a rank of at most {limit}, or leave that layer out of target_modules.",
            errors=[FieldError("/parameters/rank", problem)],
        )
    check_formats(sides, options.formats)
    return sides


def _decompose(subject: Subject, form: BlockFormat, options: QuantisationOptions) -> Decomposition:
    return decompose(
        subject.weight,
        form,
        low_rank_factors(options, subject),
        iterations=options.num_iterations,
        rtol=options.rtol,
        fisher=subject.fisher,
        polish=options.polish,
    )


def _told(subject: Subject, form: BlockFormat, found: Decomposition, size: int, with_fisher: bool) -> MatrixReport:
    weight, felt = subject.weight, subject.fisher is not None
    left = weight - rounded(found.quantised, form) - found.left @ found.right
    return MatrixReport(
        path=subject.path,
        shape=(int(weight.shape[0]), int(weight.shape[1])),
        form=form,
        packed_bytes=size,
        energy=_square(weight),
        plain=_square(weight - rounded(weight, form)),
        error=_square(left),
        weighted=found.error if felt else None,
        unweighted_start=with_fisher and not felt,
        iterations=len(found.trace),
        polished=found.polished,
    )


def _square(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())


def _packed_entries(sides: Mapping[str, tuple[int, int]], forms: Mapping[str, BlockFormat]) -> list[TensorEntry]:
    found = []
    for path, shape in sides.items():
        dtypes = {"scale2": DTYPE_NAMES[forms[path].scale_dtype], "offset": "F32"}
        shapes = tensor_shapes(numel_of(shape), forms[path])
        found += [TensorEntry(f"{path}.{name}", dtypes.get(name, "U8"), size) for name, size in shapes.items()]
    return found


def _kept_entries(weights: SourceWeights, sides: Mapping[str, Any]) -> list[TensorEntry]:
    """All tensors but the quantised weights, as they are stored."""
    gone = {f"{path}.weight" for path in sides}
    return [
        TensorEntry(name, info.dtype, info.shape) for name, (_, info) in weights.tensors.items() if name not in gone
    ]


def _factor_entries(sides: Mapping[str, tuple[int, int]], rank: int) -> list[TensorEntry]:
    found = []
    for path, (d_out, d_in) in sides.items():
        found += [TensorEntry(f"{path}.L1", "F32", (d_out, rank)), TensorEntry(f"{path}.L2", "F32", (rank, d_in))]
    return found


def _write_rest(
    source: Path,
    out: Path,
    config: Mapping[str, Any],
    sides: Mapping[str, tuple[int, int]],
    forms: Mapping[str, BlockFormat],
    options: QuantisationOptions,
    notes: Mapping[str, Any],
    matrices: list[MatrixReport],
) -> None:
    """Configuration, tokenizer, and what is known of the making."""
    for path in carried_files(source):
        if not path.name.endswith(".index.json"):
            shutil.copyfile(path, out / path.name)
    layers = {path: {"shape": list(shape), "format": forms[path].to_list()} for path, shape in sides.items()}
    quantisation = {"quant_method": METHOD, "codebook": CODEBOOK, "rank": options.rank, "layers": layers}
    write_json(out / "config.json", {**config, "quantization_config": quantisation})
    write_json(
        out / NOTES_NAME,
        {
            **notes,
            "parameters": options.model_dump(mode="json"),
            "torch": torch.__version__,
            "relative_error": relative_error(matrices),
            "modules": [item.to_dict() for item in matrices],
        },
    )
