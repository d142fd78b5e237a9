"""Runs a merge: files in, one PEFT directory and a report out, module by module.

Nothing of the base model is loaded: memory holds one module's rank components per thread, whatever the size of the
adapters, and beside them the one dense result that a method on single entries may keep (`merge.row_svd.ROOM`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from artifacts.adapter import TORCH_DTYPES, Adapter
from artifacts.export import ExportedModule, PeftWriter, lora_config
from artifacts.public_names import public_name
from merge.catalog import find_method
from merge.memory import keep_freed_memory
from merge.norms import adapter_factors, module_factors
from merge.options import MergeOptions
from merge.plan import UNKNOWN_BASE, MergeInput, MergePlan, PlannedModule, may_share_rank, plan_merge
from merge.reload import Probe, check_reload
from merge.report import MergeReport, ModuleReport
from merge.result import MergedModule
from merge.stack import Stack
from merge.threads import module_threads
from merge.warnings import merge_warnings
from merge.written import WrittenModule

Progress = Callable[[float, str], None]
Check = Callable[[MergePlan], None]
"""Called with a plan at the rank that is written, before anything is merged; may raise to refuse it."""

COMPUTE_SHARE = 0.95
"""Part of the progress bar that is the computation; the rest is reading the result back."""

_SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def merge_files(
    inputs: Sequence[tuple[MergeInput, Path]],
    method: str,
    options: MergeOptions,
    out_dir: Path,
    *,
    progress: Progress | None = None,
    device: str = "cpu",
    lineage: Mapping[str, Any] | None = None,
    check: Check | None = None,
) -> MergeReport:
    """Merge the adapters at the given paths by `method` and write a PEFT directory to `out_dir`.

    The written file is opened again, and each module's ΔW is compared with the computed one on a probe vector.

    Args:
        inputs: descriptions and places (a PEFT directory, or one safetensors file) in the order of the request.
        progress: called with the fraction done and a message, from the calling thread; may raise to stop the merge.
        lineage: stored in the file's metadata.
        check: of the plan.

    Raises:
        MergeRefused and its kin: as `merge.plan.plan_merge`; also on NaN or infinite numbers.
        DiskFull: no space for the result. ReloadMismatch: the file did not read back as computed.
    """
    started = time.monotonic()
    keep_freed_memory()
    report_progress = progress or (lambda _fraction, _message: None)
    run = MergeRun.of(inputs, method, options, torch.device(device))
    if check is not None:
        check(run.plan)
    modules, probes = run.write(out_dir, lineage, report_progress)
    rounding = check_reload(out_dir, probes, lambda: report_progress(COMPUTE_SHARE, "Reading back"))
    report_progress(1.0, "Merged")
    return run.report(modules, rounding, time.monotonic() - started)


@dataclass(frozen=True)
class MergeRun:
    """One merge in progress: planned, with its inputs open."""

    method: str
    inputs: Sequence[MergeInput]
    plan: MergePlan
    adapters: Mapping[int, Adapter]
    options: MergeOptions
    merge_module: Callable[[Stack, Any, int], MergedModule]
    dtype: str
    device: torch.device
    with_bias: bool
    adapter_factors: Mapping[int, float]

    @classmethod
    def of(
        cls,
        inputs: Sequence[tuple[MergeInput, Path]],
        method: str,
        options: MergeOptions,
        device: torch.device,
        open_adapter: Callable[[Path], Adapter] = Adapter.open,
    ) -> MergeRun:
        """Plan the merge and open the adapters that take part. Raises as `merge.plan.plan_merge`."""
        items = [item for item, _ in inputs]
        plan = plan_merge(items, method, options)
        adapters = {
            position: open_adapter(path) for position, (_, path) in enumerate(inputs) if plan.weights[position] != 0
        }
        if may_share_rank(options):
            plan = replace(plan, output_rank=shared_rank(plan, adapters) or plan.output_rank)
        with_bias = any(module.bias_key for item in plan.modules for _, module in item.owners)
        dtype = _output_dtype(options, adapters)
        factors: Mapping[int, float] = {}
        if options.norm_equalize == "adapter":
            factors = adapter_factors(plan.modules, adapters, _compute_dtype(options), device)
        merge_module = find_method(method).load()
        return cls(method, items, plan, adapters, options, merge_module, dtype, device, with_bias, factors)

    def write(
        self, out_dir: Path, lineage: Mapping[str, Any] | None, progress: Progress
    ) -> tuple[list[ModuleReport], list[Probe]]:
        """Merge every module and write it; progress runs in the calling thread, the work in threads of its own."""
        total = len(self.plan.modules)
        reports, probes = [], []
        with self.writer(out_dir, lineage) as writer, module_threads() as pool:
            done = pool.map(lambda module: self.merge_one(module, self.load(module), writer), self.plan.modules)
            for count, (report, probe) in enumerate(done, start=1):
                reports.append(report)
                probes.append(probe)
                progress(COMPUTE_SHARE * count / total, f"Merged {count} of {total} modules")
        return reports, probes

    def writer(self, out_dir: Path, lineage: Mapping[str, Any] | None) -> PeftWriter:
        """What the merged modules are written to."""
        exported = [ExportedModule(item.first, self.plan.output_rank, self.with_bias) for item in self.plan.modules]
        return PeftWriter(out_dir, exported, self._config(), dtype=self.dtype, lineage=lineage)

    @property
    def compute(self) -> torch.dtype:
        """The precision of the computation."""
        return _compute_dtype(self.options)

    def load(self, module: PlannedModule) -> Stack:
        """The components of one module. Raises MergeRefused on NaN or infinite numbers."""
        return Stack.load(module, self.adapters, self.plan.weights, self.compute, self.device)

    def merge_one(
        self, module: PlannedModule, stack: Stack, writer: PeftWriter, earlier: deque[WrittenModule] | None = None
    ) -> tuple[ModuleReport, Probe]:
        """Merge one module's components and write the result; may be called from several threads.

        Args:
            earlier: what other merges have made of the same module, which this one is added to.
        """
        factors = self._norm_factors(stack)
        if factors:
            stack = stack.scaled(factors)
        merged = self.merge_module(stack, self.options, self.plan.output_rank)
        dtype = TORCH_DTYPES[self.dtype]
        written = WrittenModule.of(
            module.path,
            merged,
            self.plan.output_rank,
            dtype,
            scale=self.options.scale,
            norm_factors=factors,
            earlier=earlier or (),
        )
        if earlier is not None:
            earlier.append(written)
        writer.write(module.path, written.A, written.B, self._bias(module, factors, dtype) if self.with_bias else None)
        return written.report, written.probe

    def report(self, modules: Sequence[ModuleReport], errors: tuple[float, float], seconds: float) -> MergeReport:
        """Of the finished merge; `errors` is what `merge.reload.check_reload` found."""
        rounding, reload_error = errors
        return MergeReport(
            method=self.method,
            parameters=self.options.model_dump(mode="json"),
            adapters=[
                {"id": item.id, "name": item.name, "weight": item.weight, "effective_weight": weight}
                for item, weight in zip(self.inputs, self.plan.weights, strict=True)
            ],
            rank=self.plan.output_rank,
            dtype=self.dtype,
            compatibility=self.plan.compatibility,
            modules=modules,
            dropped=self.plan.dropped,
            warnings=(*self.plan.warnings, *merge_warnings(modules)),
            rounding_error=rounding,
            reload_error=reload_error,
            seconds=seconds,
        )

    def _norm_factors(self, stack: Stack) -> Mapping[int, float]:
        """By owner, what its ΔW is multiplied by before the method; empty without norm_equalize."""
        if self.options.norm_equalize == "module":
            return module_factors(stack)
        return {owner: self.adapter_factors[owner] for owner, _ in stack.members} if self.adapter_factors else {}

    def _bias(self, module: PlannedModule, factors: Mapping[int, float], dtype: torch.dtype) -> Tensor:
        """λ·Σ wᵢ·sᵢ·biasᵢ: PEFT multiplies the bias of lora_B by the scaling, as all of its output."""
        total = torch.zeros(module.first.d_out, dtype=torch.float64)
        for owner, description in module.owners:
            if description.bias_key:
                bias = self.adapters[owner].tensor(description.bias_key).double()
                total += self.plan.weights[owner] * factors.get(owner, 1.0) * description.scaling * bias
        return (total * self.options.scale).to(dtype)

    def _config(self) -> dict[str, Any]:
        configs = [adapter.config for adapter in self.adapters.values()]
        known = self.inputs[next(iter(self.adapters))].base.name
        return lora_config(
            rank=self.plan.output_rank,
            target_modules=self._target_modules(),
            base_model=public_name(configs[0].base_model, None if known == UNKNOWN_BASE else known)
            or configs[0].base_model,
            revision=configs[0].revision,
            task_type=configs[0].task_type,
            fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
            lora_bias=self.with_bias,
        )

    def _target_modules(self) -> set[str]:
        """Suffixes where they say exactly what the inputs' own did (vLLM wants them); else full paths, always exact."""
        paths = {item.path for item in self.plan.modules}
        plain = all(_targets_by_suffix(adapter) for adapter in self.adapters.values())
        return {path.rsplit(".", 1)[-1] for path in paths} if plain and not self.plan.dropped else paths


def _targets_by_suffix(adapter: Adapter) -> bool:
    """Whether the adapter targets every module of the base that has one of its suffixes, without further conditions."""
    config = adapter.config
    conditions = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if config.target_modules_regex or any(config.raw.get(name) for name in conditions):
        return False
    return {path.rsplit(".", 1)[-1] for path in adapter} == set(config.target_modules)


def _compute_dtype(options: MergeOptions) -> torch.dtype:
    return torch.float64 if options.compute_dtype == "float64" else torch.float32


def shared_rank(plan: MergePlan, adapters: Mapping[int, Adapter]) -> int | None:
    """The rank of the exact sum of adapters that share lora_A, bit for bit, and its scaling in every module, as those
    of FFA-LoRA do; None: they do not."""
    for module in plan.modules:
        (position, description), *others = module.owners
        first = adapters[position].factors(description)
        for position, description in others:
            found = adapters[position].factors(description)
            if abs(found.scaling) != abs(first.scaling) or not _equal(found.A, first.A):
                return None
    return max(module.rank for item in plan.modules for _, module in item.owners)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers are the same, of whatever dtypes: torch promotes no floats of 8 bits."""
    return torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.double(), other.double())


def _output_dtype(options: MergeOptions, adapters: Mapping[int, Adapter]) -> str:
    """The safetensors name of the output dtype; of 8-bit floats only bfloat16 holds the merged values."""
    if options.output_dtype != "auto":
        return _SAFETENSORS_NAMES[options.output_dtype]
    first = next(iter(next(iter(adapters.values())).modules.values())).dtype
    return first if first in ("F32", "F16", "BF16") else "F32" if first == "F64" else "BF16"
