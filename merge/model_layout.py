"""Where the weight of a layer lies in the files of a model, and how its layer uses it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from artifacts.base_model import weight_files
from artifacts.errors import MergeRefused
from artifacts.safetensors_header import (
    BASE_DTYPE_BYTES,
    MAX_BASE_HEADER_BYTES,
    SafetensorsHeader,
    TensorInfo,
    read_header,
)

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Weight:
    """The stored weight of an adapted layer.

    Attributes:
        name: of the tensor in the files.
        transposed: stored as (d_in, d_out), as embeddings and GPT-2's Conv1D keep it.
    """

    name: str
    transposed: bool


class ModelLayout:
    """A folder of a transformers model: its files' headers, and its architecture without a single weight."""

    def __init__(self, folder: Path) -> None:
        """Raises MergeRefused when transformers can not make the model of its configuration."""
        self.folder = folder
        self.files: dict[Path, SafetensorsHeader] = {
            path: read_header(path, dtypes=BASE_DTYPE_BYTES, max_header_bytes=MAX_BASE_HEADER_BYTES)
            for path in weight_files(folder)
        }
        self.tensors: dict[str, tuple[Path, TensorInfo]] = {
            name: (path, info) for path, header in self.files.items() for name, info in header.tensors.items()
        }
        self.config, self._model = _architecture(folder)

    def weight(self, path: str) -> Weight | None:
        """The weight of the layer that an adapter calls `path`; None if the model has none that can be added to."""
        module = self._module(path)
        name = None if module is None else self.stored(f"{module[0]}.weight")
        if module is None or name is None:
            return None
        return Weight(name, _is_transposed(module[1]))

    def stored(self, name: str) -> str | None:
        """What the files call a tensor of the model: checkpoints of a bare model leave out its first component."""
        for found in (name, name.partition(".")[2]):
            if found in self.tensors or found in self.tied:
                return found
        return None

    @property
    def tied(self) -> Mapping[str, str]:
        """Tensors that are not stored since they are another one: name → what that one is called in the files."""
        keys = getattr(self._model, "_tied_weights_keys", None)
        if not isinstance(keys, dict) or not getattr(self.config, "tie_word_embeddings", False):
            return {}
        found = {}
        for name, source in keys.items():
            for stored in (source, source.partition(".")[2]):
                if name not in self.tensors and stored in self.tensors:
                    found[name] = stored
                    break
        return found

    def _module(self, path: str) -> tuple[str, nn.Module] | None:
        """An adapter of a model with a head also names the layers of a bare one, and the other way round."""
        prefix = getattr(self._model, "base_model_prefix", "")
        for name in (path, path.removeprefix(f"{prefix}."), f"{prefix}.{path}"):
            try:
                return name, self._model.get_submodule(name)
            except AttributeError:
                continue
        return None


def _architecture(folder: Path) -> tuple[Any, nn.Module]:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise MergeRefused(f"The configuration of the base model can not be read: {error}") from error
    if getattr(config, "quantization_config", None):
        raise MergeRefused(
            "The base model is quantised: ΔW can not be added to its stored numbers.",
            hint="Merge into the model that it was quantised from.",
        )
    names: Sequence[str] = getattr(config, "architectures", None) or ()
    kind = getattr(transformers, names[0], None) if names else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise MergeRefused(
            f"transformers has no architecture {names[0] if names else None!r}, which config.json names.",
            hint="Models whose code lies in their repository can not be merged into.",
        )
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: nn.Module = kind(config)
    return config, model


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Embedding | Conv1D)
