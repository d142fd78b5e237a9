"""The weights of a base model, layer by layer: of a transformers model, or of the parts of a diffusers pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from artifacts.adapter import TORCH_DTYPES
from artifacts.base_model import PIPELINE_INDEX, weight_files
from artifacts.errors import FieldError, FileBroken, FormatUnknown, MergeRefused
from artifacts.formats.protocol import COMPONENTS
from artifacts.safetensors_header import BASE_DTYPE_BYTES, MAX_BASE_HEADER_BYTES, TensorInfo, read_header
from merge.model_layout import ModelLayout

Stored = tuple[Path, TensorInfo]


class BaseWeights:
    """Reads one weight at a time, as float32."""

    def __init__(self, folder: Path) -> None:
        """Raises MergeRefused when transformers can not make the model of its configuration."""
        self._folder = folder
        self._layout = None if (folder / PIPELINE_INDEX).is_file() else ModelLayout(folder)
        self._parts: dict[str, dict[str, Stored]] = {}

    def of(self, path: str) -> Tensor:
        """W of a layer, (d_out, d_in), or (c_out, c_in, kh, kw) of a convolution.

        Raises:
            MergeRefused: there is no such layer, or its weight has a type that is no number of a weight.
        """
        found = self._in_pipeline(path, "weight") if self._layout is None else self._in_model(self._layout, path)
        if found is None:
            raise MergeRefused(
                f"The base model has no layer {path} whose weight could be read.",
                errors=[FieldError("/base_model", f"has no layer {path}")],
            )
        entry, transposed = found
        W = _read(*entry)
        return W.T.contiguous() if transposed else W

    def has_bias(self, path: str) -> bool:
        """Whether the layer adds a bias that is not 0."""
        if self._layout is None:
            found = self._in_pipeline(path, "bias")
        else:
            weight = self._layout.weight(path)
            name = None if weight is None else f"{weight.name.removesuffix('.weight')}.bias"
            entry = None if name is None else self._layout.tensors.get(name)
            found = None if entry is None else (entry, False)
        return found is not None and bool(_read(*found[0]).any())

    def _in_model(self, layout: ModelLayout, path: str) -> tuple[Stored, bool] | None:
        weight = layout.weight(path)
        entry = None if weight is None else layout.tensors.get(layout.tied.get(weight.name, weight.name))
        if weight is None or entry is None or entry[1].dtype not in TORCH_DTYPES:
            return None
        return entry, weight.transposed

    def _in_pipeline(self, path: str, leaf: str) -> tuple[Stored, bool] | None:
        component, _, name = path.partition(".")
        tensors = self._part(component)
        # Text encoders are saved with and without the name of what their class wraps.
        for found in (name, f"text_model.{name}", name.removeprefix("text_model.")):
            entry = tensors.get(f"{found}.{leaf}")
            if entry is not None and entry[1].dtype in TORCH_DTYPES:
                return entry, False
        return None

    def _part(self, component: str) -> dict[str, Stored]:
        """The tensors of a part of the pipeline; none if it has no such part."""
        if component not in self._parts:
            self._parts[component] = {}
            folder = self._folder / component
            if component in COMPONENTS and folder.is_dir():
                try:
                    self._parts[component] = _tensors(weight_files(folder))
                except (FormatUnknown, FileBroken) as error:
                    raise MergeRefused(f"The weights of {component} of the base model: {error.detail}") from error
        return self._parts[component]


def _tensors(files: Sequence[Path]) -> dict[str, Stored]:
    headers = (
        (path, read_header(path, dtypes=BASE_DTYPE_BYTES, max_header_bytes=MAX_BASE_HEADER_BYTES)) for path in files
    )
    return {name: (path, info) for path, header in headers for name, info in header.tensors.items()}


def _read(file: Path, info: TensorInfo) -> Tensor:
    with file.open("rb", buffering=0) as opened:
        data = bytearray(os.pread(opened.fileno(), info.end - info.begin, info.begin))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape).float()


def needed(base: BaseWeights | None, what: str) -> BaseWeights:
    """The base weights, where what an adapter adds depends on them.

    Args:
        what: the kind of adapter; completes "What a … adds depends on …".

    Raises:
        MergeRefused: there are none.
    """
    if base is None:
        raise MergeRefused(
            f"What a {what} adapter adds depends on the weights of its base model.",
            hint="Register the base model from a folder of the server (POST /models), and name it as base_model.",
            errors=[FieldError("/base_model", "is needed")],
        )
    return base
