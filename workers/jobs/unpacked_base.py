"""An adapter that was trained beside packed weights becomes, together with those, what every program loads."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts.errors import MergeRefused
from merge.base_output import fold_into_base
from merge.conversion import convert_to_lora
from storage.adapters import Parent
from train.quantised.unpacking import Dtype, unpack_base
from workers.adapter_names import NAME_LIMIT
from workers.context import JobContext, JobOutcome, NewAdapter, NewModel, StoredAdapter, StoredModel

LIBRARIES = ("rankwise", "torch", "transformers")
UNPACKED, CONVERTED, FOLDED = 0.6, 0.7, 0.95


def convert(context: JobContext, stored: StoredAdapter, directory: Path) -> JobOutcome:
    """Write Q as ordinary weights, with scaling·B·A as a LoRA beside them (`to: unpacked_lora`) or in them (`merged`).

    `params`: {adapter, to, base_model, dtype, name}.

    Raises:
        BaseMismatch: the base model's packed weights are not those that the adapter was trained on.
        MergeRefused: modules that were trained whole, numbers that are not finite in the dtype.
        NotFound: the base model is gone since the job was submitted.
    """
    params = context.params
    base, source = context.model_source(params["base_model"])
    dtype: Dtype = params.get("dtype") or "float32"
    identities = stored.manifest.config.get("packed_weights")
    if not isinstance(identities, dict):
        raise MergeRefused("The adapter does not tell which packed weights it was trained on.")
    recipe = {
        "kind": "convert",
        "to": params["to"],
        "dtype": dtype,
        "adapter": {"id": stored.id, "weights_digest": stored.manifest.weights_digest},
        "base_model": {"id": base.id, "name": base.name, "weights_digest": base.ref.weights_digest},
        "versions": {library: version(library) for library in LIBRARIES},
    }
    merged = params["to"] == "merged"
    dense = context.scratch / "unpacked"
    unpacked = unpack_base(
        Path(source.location),
        dense,
        dtype="float32" if merged else dtype,  # what is added to is rounded once, after the sum
        identities=identities,
        progress=lambda fraction, message: context.progress(UNPACKED * fraction, message),
    ).to_dict()
    name = _model_name(base, dtype)
    plain = context.scratch / "converted"
    report = convert_to_lora(
        directory,
        plain,
        unpacked=name,
        lineage={"from": stored.id, **recipe},
        progress=lambda fraction, message: context.progress(UNPACKED + (CONVERTED - UNPACKED) * fraction, message),
    ).to_dict()
    told: dict[str, Any] = {**report, "to": params["to"], "model": recipe["base_model"], "base": unpacked}
    if merged:
        return _folded(context, stored, (dense, plain), dtype, recipe, told)
    context.progress(FOLDED, "storing model and adapter")
    adapter = NewAdapter(
        directory=plain,
        name=params.get("name") or f"{stored.name} (unpacked)"[-NAME_LIMIT:],
        description=f"{stored.name} as a plain LoRA on its base model's unpacked weights.",
        base_model=name,
        parents=(Parent(stored.id, recipe),),
        on_new_model=True,
    )
    # Not the adapter: others that were trained on the same packed weights have the same model.
    made = {key: value for key, value in recipe.items() if key != "adapter"}
    return JobOutcome((adapter,), told, models=(NewModel(dense, name, made),))


def _folded(
    context: JobContext,
    stored: StoredAdapter,
    folders: tuple[Path, Path],
    dtype: Dtype,
    recipe: dict[str, Any],
    told: dict[str, Any],
) -> JobOutcome:
    """Q + scaling·B·A as one model."""
    output = context.scratch / "merged"
    folded = fold_into_base(
        *folders,
        output,
        dtype=dtype,
        force=True,  # whoever asks for 16 bits is told what they lose
        progress=lambda fraction, message: context.progress(CONVERTED + (FOLDED - CONVERTED) * fraction, message),
    ).to_dict()
    context.progress(FOLDED, "storing the model")
    name = context.params.get("name") or f"{stored.name} (merged)"[-NAME_LIMIT:]
    return JobOutcome(report={**told, "base": folded}, models=(NewModel(output, name, recipe),))


def _model_name(base: StoredModel, dtype: Dtype) -> str:
    tail = " (unpacked)" if dtype == "float32" else f" (unpacked, {dtype})"
    return base.name[: NAME_LIMIT - len(tail)] + tail
