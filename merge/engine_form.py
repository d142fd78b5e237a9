"""An adapter in the form that an engine loads: where it needs that, the same ΔW with one rank and scaling 1."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from artifacts import intake
from artifacts.compatibility import Engine, findings
from artifacts.engine_outlook import UNEVEN, check_engine, planned, told
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME
from artifacts.manifest import AdapterManifest, LoraModule
from merge.options import CatOptions
from merge.plan import MergeInput, MergePlan

_PLACES = {"vllm-rank": "/parameters/rank", "vllm-bias": "/adapters", "language-model": "/adapters"}


def check_merged(plan: MergePlan, engine: Engine) -> None:
    """Refuse a merge whose result the engine will not load. Raises RequestInvalid."""
    rank = plan.output_rank
    with_bias = any(module.bias_key for item in plan.modules for _, module in item.owners)
    modules = [_merged(item.first, rank, with_bias) for item in plan.modules]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_bias": with_bias}
    check_engine(planned(modules, config, rank=rank), engine, _PLACES)


def _merged(like: LoraModule, rank: int, with_bias: bool) -> LoraModule:
    """A module of the merged adapter, as its file will describe it."""
    return LoraModule(
        path=like.path,
        kind=like.kind,
        a_key=f"base_model.model.{like.path}.lora_A.weight",
        b_key=f"base_model.model.{like.path}.lora_B.weight",
        rank=rank,
        alpha=rank,
        scaling=1.0,
        d_in=like.d_in,
        d_out=like.d_out,
        a_shape=(rank, *like.a_shape[1:]),
        b_shape=(like.b_shape[0], rank, *like.b_shape[2:]),
        dtype=like.dtype,
        bias_key=f"base_model.model.{like.path}.lora_B.bias" if with_bias else None,
    )


def fit_engine(directory: Path, engine: Engine, output: Path) -> tuple[Path, dict[str, Any]]:
    """The adapter in `directory` as `engine` loads it: written anew to `output` where that is needed.

    Returns:
        (where it is, `target_engine` of the report).

    Raises:
        DiskFull: no space for it. ReloadMismatch: the file did not read back as it was computed.
    """
    manifest = intake.inspect(directory)
    uneven = [found for found in findings(manifest, engine) if found.rule in UNEVEN]
    if not uneven or not manifest.mergeable:
        return directory, told(manifest, engine)
    # Only here: torch takes seconds, and most adapters need none of it.
    from merge.engine import merge_files

    # The sum of this adapter alone, with factors that are padded and scalings that are multiplied into them.
    alone = MergeInput.of(manifest, "adapter", "adapter", None)
    report = merge_files([(alone, directory)], "cat", CatOptions(), output)
    for extra in sorted(directory.iterdir()):
        if extra.is_file() and extra.name not in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(extra, output / extra.name)
    return output, told(intake.inspect(output), engine, _adapted(manifest, report.rank, report.rounding_error))


def _adapted(manifest: AdapterManifest, rank: int, rounding: float) -> Sequence[str]:
    padded = sum(module.rank < rank for module in manifest.modules)
    scalings = {module.scaling for module in manifest.modules}
    found = [
        (
            f"The scalings ({min(scalings):g} to {max(scalings):g}) were multiplied into the factors, and are 1 now; "
            f"rounding changed ΔW by {rounding:.2g} of its norm."
        )
    ]
    if padded:
        found.append(f"The factors of {padded} of {len(manifest.modules)} modules are filled up to rank {rank} with 0.")
    return found
