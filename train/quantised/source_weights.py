"""The weights of a base model's folder: which are of linear layers, and each of them read alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from artifacts.adapter import TORCH_DTYPES
from artifacts.base_model import weight_files
from artifacts.errors import FieldError, FileBroken, RequestInvalid
from artifacts.safetensors_header import BASE_DTYPE_BYTES, MAX_BASE_HEADER_BYTES, TensorInfo, read_header

FLOATS = ("F32", "F16", "BF16")
_COPY_BYTES = 2**24


class SourceWeights:
    """A folder of a transformers model, of which one weight at a time is in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises RequestInvalid when transformers can not make the model of its configuration."""
        self.folder = folder
        self.tensors: dict[str, tuple[Path, TensorInfo]] = {}
        for path in weight_files(folder):
            header = read_header(path, dtypes=BASE_DTYPE_BYTES, max_header_bytes=MAX_BASE_HEADER_BYTES)
            self.tensors |= {name: (path, info) for name, info in header.tensors.items()}

    def linear(self) -> dict[str, tuple[int, int]]:
        """Path, as in the names of the tensors, → (d_out, d_in) of every linear layer that is stored as its own weight.

        Not Conv1D's, which keep the weight as (d_in, d_out), and no quantised ones.
        """
        paths = _linear_paths(self.folder)
        found = {}
        for name, (_, info) in self.tensors.items():
            path, _, leaf = name.rpartition(".")
            if leaf == "weight" and path in paths and len(info.shape) == 2 and info.dtype in FLOATS:
                found[path] = (info.shape[0], info.shape[1])
        return found

    def weight(self, path: str) -> Tensor:
        """W of a layer, (d_out, d_in) float32, finite.

        Raises:
            RequestInvalid: it has NaN or infinite entries.
        """
        found = self.tensor(f"{path}.weight").to(torch.float32)
        if not bool(found.isfinite().all()):
            problem = f"{path} has NaN or infinite weights, which can not be quantised"
            raise RequestInvalid(f"{problem}.", errors=[FieldError("/parameters/target_modules", problem)])
        return found

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        file, info = self.tensors[name]
        data = bytearray(info.end - info.begin)
        with file.open("rb", buffering=0) as opened:
            _read(opened.fileno(), memoryview(data), info.begin)
        return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)

    def pieces(self, name: str) -> Iterator[tuple[int, memoryview]]:
        """The bytes of a tensor as they are stored, with the place of each piece in it."""
        file, info = self.tensors[name]
        size = info.end - info.begin
        with file.open("rb", buffering=0) as opened:
            for start in range(0, max(size, 1), _COPY_BYTES):
                yield start, memoryview(os.pread(opened.fileno(), min(_COPY_BYTES, size - start), info.begin + start))


def _read(descriptor: int, data: memoryview, begin: int) -> None:
    while data:
        taken = os.preadv(descriptor, [data[:_COPY_BYTES]], begin)
        if not taken:
            raise FileBroken("A file of the base model has become shorter while it was read.")
        data, begin = data[taken:], begin + taken


def _linear_paths(folder: Path) -> set[str]:
    """Paths of the model's linear layers, with and without the prefix that classes with a head put before them."""
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        problem = f"transformers can not make the model of its config.json: {error}"
        raise RequestInvalid(f"{problem}.", errors=[FieldError("/model", problem[:300])]) from error
    prefix = str(getattr(model, "base_model_prefix", ""))
    bare = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return bare | {f"{prefix}.{path}" for path in bare}
