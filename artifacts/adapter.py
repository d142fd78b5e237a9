"""The Adapter value: a configuration and a lazy, memory-mapped mapping from module path to its LoRA factors."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from artifacts.errors import ShapeMismatch
from artifacts.layout import AdapterLayout, read_layout
from artifacts.manifest import FormatFacts, LoraModule
from artifacts.peft_config import PeftLoraConfig
from artifacts.safetensors_header import DTYPE_BYTES, TensorInfo
from artifacts.shard_blocks import lora_factors

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class LoraFactors:
    """One module's ΔW = scaling·B·A, with A: (r, d_in) and B: (d_out, r).

    Convolutions are flattened to A: (r, c_in·kh·kw) and B: (c_out, r).
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class Adapter(Mapping[str, LoraFactors]):
    """An immutable LoRA adapter on disk, as a mapping from module path to `LoraFactors`.

    Tensors are views of a private memory map of the file: opening costs one header, and only the bytes that are used
    are ever read. `release` gives the pages of a module back, so that a pass over gigabytes stays in a few megabytes.
    """

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout
        self._modules = MappingProxyType({module.path: module for module in layout.modules})
        with layout.weights_path.open("rb") as file:
            # ACCESS_COPY gives writable pages, which torch wants, and never writes to the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Open a PEFT directory, or one safetensors file that carries its configuration.

        Raises:
            FileBroken, ConfigRefused, FormatUnknown, PickleRefused: as `artifacts.layout.read_layout`.
        """
        return cls(read_layout(path))

    @property
    def config(self) -> PeftLoraConfig:
        return self._layout.config

    @property
    def modules(self) -> Mapping[str, LoraModule]:
        """The torch-free description of each module, by path."""
        return self._modules

    @property
    def facts(self) -> FormatFacts:
        """What was understood of the file besides its modules."""
        return self._layout.facts

    @property
    def metadata(self) -> Mapping[str, str]:
        """The string metadata of the safetensors file."""
        return self._layout.header.metadata

    def tensor(self, key: str) -> Tensor:
        """The stored tensor of that name, in its own dtype and shape, without a copy."""
        info = self._layout.header.tensors[key]
        dtype = TORCH_DTYPES[info.dtype]
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=dtype)
        if info.begin % DTYPE_BYTES[info.dtype]:
            # The format does not promise alignment; a copy of such a tensor is rarer than it is harmful.
            return torch.frombuffer(bytearray(self._map[info.begin : info.end]), dtype=dtype).view(info.shape)
        return torch.frombuffer(self._map, dtype=dtype, offset=info.begin, count=info.elements).view(info.shape)

    def __getitem__(self, path: str) -> LoraFactors:
        return self.factors(self._modules[path])

    def factors(self, module: LoraModule) -> LoraFactors:
        """The factors of one of this adapter's modules, whose dimensions may have been found out elsewhere.

        Raises:
            ShapeMismatch: nobody told the dimensions of a layer that has a block of MiSS.
        """
        if module.block_key is not None:
            if not module.complete:
                raise ShapeMismatch(f"{module.path}: a MiSS adapter does not tell the sides of its layers.")
            return LoraFactors(*lora_factors(self.tensor(module.block_key), module.d_out, module.d_in), 1.0)
        A, B = self.tensor(module.a_key), self.tensor(module.b_key)
        if not module.plain:
            A, B = self._view(module, A, B)
        return LoraFactors(A.reshape(module.rank, module.d_in), B.reshape(module.d_out, module.rank), module.scaling)

    def _view(self, module: LoraModule, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The part of stored tensors that is this module's (`LoraModule`)."""
        if module.transposed:
            A, B = A.T, B.T
        if module.head_rows:
            B = B.reshape(-1, module.head_rows // 2, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
        if module.b_rows:
            spans = [B[start:stop] for start, stop in module.b_rows]
            B = spans[0] if len(spans) == 1 else torch.cat(spans)
        if module.rank_span is not None:
            start, stop = module.rank_span
            A, B = A[start:stop], B[:, start:stop]
        if module.mid_key is not None:
            # ΔW[o,i,k,l] = Σ B[o,a]·core[a,b,k,l]·A[b,i]: the core goes into A, which keeps the rank
            core = self.tensor(module.mid_key).to(torch.float32)
            A = torch.einsum("abkl,bi->aikl", core, A.reshape(A.shape[0], -1).to(torch.float32))
        return A, B

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def release(self, path: str) -> None:
        """Drop the pages of one module from memory. Views of it stay valid: they are read again when touched."""
        for key in self._modules[path].factor_keys:
            self._drop_pages(self._layout.header.tensors[key])

    def _drop_pages(self, info: TensorInfo) -> None:
        begin = -(-info.begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = info.end // mmap.PAGESIZE * mmap.PAGESIZE - begin
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, begin, length)
