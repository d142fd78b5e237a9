"""Writing a merged or trained adapter as a PEFT directory that stock PEFT loads, with its lineage inside the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from artifacts.layout import CONFIG_NAME, LINEAGE_KEY, METADATA_KEY, WEIGHTS_NAME
from artifacts.manifest import LoraModule
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry

KEY_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class ExportedModule:
    """A module to be written: `like` gives its path, kind and all dimensions but the rank."""

    like: LoraModule
    rank: int
    has_bias: bool = False

    @property
    def a_shape(self) -> tuple[int, ...]:
        return (self.rank, *self.like.a_shape[1:])

    @property
    def b_shape(self) -> tuple[int, ...]:
        return (self.like.b_shape[0], self.rank, *self.like.b_shape[2:])

    @property
    def a_key(self) -> str:
        name = "lora_embedding_A" if self.like.kind == "embedding" else "lora_A.weight"
        return f"{KEY_PREFIX}{self.like.path}.{name}"

    @property
    def b_key(self) -> str:
        name = "lora_embedding_B" if self.like.kind == "embedding" else "lora_B.weight"
        return f"{KEY_PREFIX}{self.like.path}.{name}"

    @property
    def bias_key(self) -> str:
        return f"{KEY_PREFIX}{self.like.path}.lora_B.bias"


def lora_config(
    *,
    rank: int,
    target_modules: Iterable[str],
    base_model: str | None,
    revision: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    lora_bias: bool = False,
) -> dict[str, Any]:
    """An adapter_config.json whose scaling is exactly 1: r = lora_alpha, no rsLoRA, no DoRA and no patterns."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(target_modules),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_bias": lora_bias,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
    }


class PeftWriter:
    """Writes the factors of one module after another into `directory`, in one file of one dtype.

    Use as a context manager; `write` may be called from several threads. Nothing but the configuration exists at the
    final names until every module has been written.

    Raises:
        DiskFull: when the space can not be had.
    """

    def __init__(
        self,
        directory: Path,
        modules: Sequence[ExportedModule],
        config: Mapping[str, Any],
        *,
        dtype: str,
        lineage: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._config = config
        self._modules = {module.like.path: module for module in modules}
        metadata = {"format": "pt", METADATA_KEY: _json(config)}
        if lineage is not None:
            metadata[LINEAGE_KEY] = _json(lineage)
        self._file = SafetensorsWriter(directory / WEIGHTS_NAME, _entries(modules, dtype), metadata)

    def write(self, path: str, A: Tensor, B: Tensor, bias: Tensor | None = None) -> None:
        """Store A: (r, d_in), B: (d_out, r) and, if announced, the bias (d_out,) of one module, in the file's dtype."""
        module = self._modules[path]
        self._file.write(module.a_key, A.reshape(module.a_shape))
        self._file.write(module.b_key, B.reshape(module.b_shape))
        if bias is not None:
            self._file.write(module.bias_key, bias)

    def __enter__(self) -> PeftWriter:
        self._file.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._file.__exit__(*details)
        if details[0] is None:
            text = json.dumps(self._config, indent=2, sort_keys=True)
            (self._directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def _entries(modules: Sequence[ExportedModule], dtype: str) -> list[TensorEntry]:
    entries = []
    for module in modules:
        entries.append(TensorEntry(module.a_key, dtype, module.a_shape))
        entries.append(TensorEntry(module.b_key, dtype, module.b_shape))
        if module.has_bias:
            entries.append(TensorEntry(module.bias_key, dtype, module.b_shape[:1]))
    return entries


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
