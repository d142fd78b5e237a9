"""Moving an adapter without training: module by module, by the weights of the two bases alone."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.errors import FieldError, NotMergeable, TransferRefused
from train.base_files import BaseFiles
from train.methods.peft_adapter import write_adapter
from train.stored_factors import PREFIX
from transfer.distillation import layers_of
from transfer.options import WeightOptions
from transfer.source_model import load_base
from transfer.subspaces import SubspaceCache, similarity
from transfer.weight_protocol import Delta, Pair, Unfit, WeightMethod

NAMED = 20


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """A base model, and the digest of its weights."""

    files: BaseFiles
    digest: str


@dataclass(frozen=True, slots=True)
class MovedModule:
    """What became of a module.

    Attributes:
        similarity: Φ of the two weights' column spaces, where it is defined.
        energy_kept: ‖ΔW_t‖²/‖ΔW_s‖².
    """

    path: str
    rank: int
    similarity: float | None
    energy_kept: float


@dataclass(frozen=True, slots=True)
class WeightReport:
    """Modules that were moved, and why the others were not."""

    moved: tuple[MovedModule, ...]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        energies = [module.energy_kept for module in self.moved]
        alike = [module.similarity for module in self.moved if module.similarity is not None]
        return {
            "moved_modules": len(self.moved),
            "left_out_modules": len(self.left_out),
            "left_out": [{"module": path, "reason": why} for path, why in list(self.left_out.items())[:NAMED]],
            "mean_energy_kept": sum(energies) / len(energies) if energies else None,
            "mean_similarity": sum(alike) / len(alike) if alike else None,
        }


def read_deltas(folder: Path) -> dict[str, Delta]:
    """Path → ΔW of every module of a stored adapter, in float32.

    Raises:
        NotMergeable: its ΔW is not scaling·B·A of linear layers.
    """
    adapter = Adapter.open(folder)
    problems = list(adapter.config.refusals)
    problems += [f"{path} is no linear layer" for path, module in adapter.modules.items() if module.kind != "linear"]
    problems += [f"{path} has a bias" for path, module in adapter.modules.items() if module.bias_key is not None]
    if problems or not adapter.modules:
        raise NotMergeable(
            f"The adapter's weights can not be moved: {problems[0] if problems else 'it has no factors'}.",
            hint="Take trans-lora, which needs only the adapter's answers.",
            errors=[FieldError("/adapter", problem) for problem in problems[:NAMED]],
        )
    found = {}
    for path in adapter:
        factors = adapter[path]
        found[path] = Delta(factors.B.float() * factors.scaling, factors.A.float().clone())
    return found


def move_weights(
    method: WeightMethod,
    options: WeightOptions,
    adapter: Path,
    source: BaseWeights,
    target: BaseWeights,
    cache: Path,
    output: Path,
) -> WeightReport:
    """Write the adapter for the target base.

    Args:
        cache: folder of decomposed weights, shared by all transfers. At no time is more than one base in memory.

    Raises:
        NotMergeable: see `read_deltas`.
        TransferRefused: no module could be moved, or one could not and the options allow none to be left out.
    """
    deltas = read_deltas(adapter)
    sides = layers_of(target.files)
    left_out = {path: "the target base has no such layer" for path in deltas if path not in sides}
    paths = sorted(path for path in deltas if path in sides)
    caches: list[SubspaceCache] = []
    if options.subspace_rank is not None and paths:
        caches = [SubspaceCache(cache, base.digest, options.subspace_rank) for base in (source, target)]
        for base, own in zip((source, target), caches, strict=True):
            _fill(own, base.files, paths)
    moved: dict[str, Delta] = {}
    told: list[MovedModule] = []
    for path in paths:
        pair = _pair(path, deltas[path], sides[path], caches)
        try:
            moved[path] = method(pair, options)
        except Unfit as problem:
            left_out[path] = str(problem)
            continue
        told.append(_told(pair, moved[path]))
    if not moved or (left_out and not options.partial):
        raise _refused(left_out, len(deltas))
    write_factors(output, moved, target.files.name)
    return WeightReport(tuple(told), left_out)


def write_factors(output: Path, deltas: Mapping[str, Delta], base_name: str) -> None:
    """Write ΔW of every path as an adapter that PEFT loads: scaling 1, the rank of each layer its own."""
    ranks = {path: delta.A.shape[0] for path, delta in deltas.items()}
    rank = max(ranks.values())
    different = {path: own for path, own in ranks.items() if own != rank}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        rank_pattern=different,
        alpha_pattern=dict(different),
        target_modules=sorted(deltas),
    )
    config.base_model_name_or_path = base_name
    tensors: dict[str, Tensor] = {}
    for path, delta in deltas.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = delta.A.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = delta.B.contiguous()
    write_adapter(output, tensors, config)


def _fill(cache: SubspaceCache, base: BaseFiles, paths: Sequence[str]) -> None:
    if all(cache.has(path) for path in paths):
        return
    model = load_base(base)
    for path in paths:
        cache.add(path, weight_of(model, path))
    del model
    gc.collect()


def weight_of(model: torch.nn.Module, path: str) -> Tensor:
    """The weight of a linear layer as (d_out, d_in), also where it is stored the other way round."""
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(path)
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


def _pair(path: str, delta: Delta, sides: tuple[int, int], caches: Sequence[SubspaceCache]) -> Pair:
    if not caches:
        return Pair(path, delta, sides, None, None)
    source, target = (cache.get(path) for cache in caches)
    rank = min(source.rank, target.rank)
    return Pair(path, delta, sides, source.cut(rank), target.cut(rank))


def _told(pair: Pair, moved: Delta) -> MovedModule:
    before = pair.delta.energy
    alike = None if pair.source is None or pair.target is None else similarity(pair.source, pair.target)
    return MovedModule(pair.path, moved.A.shape[0], alike, moved.energy / before if before > 0 else 0.0)


def _refused(left_out: Mapping[str, str], modules: int) -> TransferRefused:
    path, why = next(iter(left_out.items()))
    return TransferRefused(
        f"{len(left_out)} of the adapter's {modules} modules can not be moved; the first is {path}: {why}.",
        hint="Take trans-lora, which needs no likeness of the two bases.",
        errors=[FieldError(path, why) for path, why in list(left_out.items())[:NAMED]],
    )
