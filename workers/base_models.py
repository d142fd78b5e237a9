"""Loading a registered base model: where its files are, how large they are, and the model itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from artifacts.base_model import PIPELINE_INDEX
from artifacts.errors import NotFound, RequestInvalid
from storage.tables import ModelRow
from train.base_files import BaseFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compose.pipelines import LoadedPipeline

DEVICE_SHARE = 0.6  # of a CUDA device's memory, for models that wait to be used again
HOST_SHARE = 0.25  # of the main memory


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What `from_pretrained` needs, and the bytes of its weight files (0 if they are not here yet)."""

    name: str
    location: str
    revision: str | None
    size: int


def locate(row: ModelRow, roots: Sequence[str]) -> ModelSource:
    """Where the weights of a registered model are.

    Raises:
        NotFound: its folder is not there (any more).
        RequestInvalid: its folder lies outside of `roots`.
    """
    if row.source == "hub":
        return ModelSource(row.name, row.location, row.revision, 0)
    folder = Path(row.location).resolve()
    if not any(folder.is_relative_to(Path(root).resolve()) for root in roots):
        raise RequestInvalid(
            f"The base model {row.name!r} lies in {folder}, which is in none of this worker's model roots.",
            hint="Set RANKWISE_MODEL_ROOTS on the worker as on the server that registered the model.",
        )
    if not folder.is_dir():
        raise NotFound(
            f"The folder {folder} of the base model {row.name!r} is not there.",
            hint="Put it back, or register the model where it is now; then retry the job.",
        )
    weights = "*/*.safetensors" if (folder / PIPELINE_INDEX).is_file() else "*.safetensors"
    return ModelSource(row.name, str(folder), None, sum(path.stat().st_size for path in folder.glob(weights)))


def load(source: ModelSource, *, dtype: str, device: str) -> PreTrainedModel:
    """Load a causal language model, ready for evaluation, with no gradients; see `train.base_files.BaseFiles`.

    Raises:
        RequestInvalid: it can not be loaded.
    """
    from transformers import AutoModelForCausalLM

    files = BaseFiles(source.name, source.location, source.revision)
    return files.load(AutoModelForCausalLM, "causal language model", dtype=dtype, device=device)


def load_pipeline(source: ModelSource, *, dtype: str, device: str) -> LoadedPipeline:
    """Load a diffusers pipeline that images are composed with.

    Args:
        dtype: a torch dtype's name.

    Raises:
        ComposeRefused: it is no such pipeline, or can not be had or loaded.
    """
    import torch

    from compose.pipelines import LoadedPipeline, from_hub

    folder = Path(source.location)
    if not folder.is_absolute():  # a name on the hub
        folder = from_hub(source.location, source.revision)
    return LoadedPipeline.load(folder, dtype=getattr(torch, dtype), device=device)


def default_limit(device: str) -> int:
    """Bytes that kept models may take when nobody has said how many: a share of the memory that they lie in."""
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None:
        return int(torch.cuda.mem_get_info(device)[1] * DEVICE_SHARE)
    return host_limit()


def host_limit() -> int:
    """The share of the main memory that kept models may take, bytes, for all workers of the machine together."""
    return int(psutil.virtual_memory().total * HOST_SHARE)
