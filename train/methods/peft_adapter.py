"""What the methods have in common whose layers are PEFT's: wrapping, saving, loading, and the plain export."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from artifacts.adapter import TORCH_DTYPES
from artifacts.errors import FileBroken
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
from train.options.common import TrainOptions
from train.protocol import MethodContext, TrainMethod
from train.quiet import peft_deprecations_ignored
from train.stored_factors import peft_tensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "default"
_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

Options = TypeVar("Options", bound=TrainOptions)


class PeftMethod(TrainMethod[Options]):
    """A method whose layers are PEFT's. The export is the trained adapter as it is."""

    @abstractmethod
    def config(self, context: MethodContext) -> PeftConfig:
        """PEFT's configuration of the adapter."""

    def prepare(self, model: nn.Module, context: MethodContext) -> nn.Module:
        config = self.config(context)
        config.base_model_name_or_path = str(getattr(model, "name_or_path", "") or "")
        prepared = self.wrap(model, config)
        if context.start is not None and context.checkpoint is None:
            put_adapter_tensors(prepared, peft_tensors(context.start))
        return prepared

    def wrap(self, model: nn.Module, config: PeftConfig, *, empty: bool = False) -> nn.Module:
        """The model with the adapter; `empty` leaves its factors without memory, for what fills them at once."""
        with peft_deprecations_ignored():
            wrapped: nn.Module = get_peft_model(model, config, adapter_name=ADAPTER, low_cpu_mem_usage=empty)
        return wrapped

    def save(self, model: nn.Module, directory: Path) -> None:
        save_file(adapter_tensors(model), directory / WEIGHTS, metadata={"format": "pt"})

    def load(self, model: nn.Module, directory: Path) -> None:
        put_adapter_tensors(model, load_file(directory / WEIGHTS))

    def export(self, model: nn.Module, directory: Path) -> None:
        config: PeftConfig = model.peft_config[ADAPTER]  # type: ignore[index]
        write_adapter(directory, adapter_tensors(model), config)


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU, under the names of its file."""
    return {name: to_file(value) for name, value in sorted(_state(model).items())}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    # Left to itself PEFT asks the hub whether the vocabulary was resized.
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return found


def to_file(value: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor as safetensors takes it."""
    return value.detach().to("cpu", copy=True).contiguous()


def put_adapter_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors of `adapter_tensors`, or of a stored adapter, into the model.

    Raises:
        FileBroken: some are missing, have no place, or have another shape than their place.
    """
    expected = _state(model)
    if odd := sorted(name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape):
        found, wanted = (tuple(values[odd[0]].shape) for values in (tensors, expected))
        raise FileBroken(
            f"The file does not hold the adapter that is trained: {odd[0]} has the shape {found}, not {wanted}."
        )
    result = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
    if result.unexpected_keys or tensors.keys() != expected.keys():
        lost = sorted(set(result.unexpected_keys) | (tensors.keys() ^ expected.keys()))
        raise FileBroken(f"The file does not hold the adapter that is trained: {', '.join(lost[:5])}.")


def write_adapter(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that PEFT loads. The same adapter gives the same bytes.

    Args:
        metadata: strings for the header of the weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    entries = [TensorEntry(name, _DTYPES[value.dtype], tuple(value.shape)) for name, value in sorted(tensors.items())]
    # safetensors' own writer puts several strings in an order of chance
    with SafetensorsWriter(directory / WEIGHTS, entries, {"format": "pt", **(metadata or {})}) as file:
        for name, value in tensors.items():
            file.write(name, value)
    document = config_document(config)
    (directory / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def config_document(config: PeftConfig) -> dict[str, Any]:
    """The configuration as JSON: sets, whose order is another in every process, become sorted lists."""
    document = {
        key: sorted(value) if isinstance(value, set | frozenset) else value for key, value in config.to_dict().items()
    }
    document["inference_mode"] = True
    # PEFT adds the usual names of heads each time that it wraps a classifier.
    if saved := document.get("modules_to_save"):
        document["modules_to_save"] = sorted(set(saved))
    return document
