"""A GGUF adapter taken in: rewritten as the PEFT directory that it was made of, tensor by tensor.

Numbers keep their bits, but for Q8_0, which becomes float32 exactly. Rows that llama.cpp has in another order get
transformers' back (`artifacts.formats.gguf`). llama.cpp multiplies by alpha over the rank, or by 1 where alpha is 0 or
missing (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.h).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from artifacts.errors import ConfigRefused, FileBroken, FormatUnknown, TooLarge
from artifacts.float_codes import decode, encode
from artifacts.formats.gguf import A_END, ALPHA_KEY, B_END, BASE_CONFIG, EMBEDDING, FAMILIES, Family, head_rows
from artifacts.formats.written_config import most_common, short
from artifacts.gguf_file import GgufHeader, GgufTensor, read_gguf_header
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME
from artifacts.peft_keys import PREFIX
from artifacts.safetensors_header import DTYPE_BYTES, packed_header

_CHUNK_BYTES = 4 * 1024 * 1024
_MOST_AT_ONCE = 512 * 1024 * 1024
"""What may have to be in memory: an embedding's factor that is transposed, or the rows of one head."""
_REPOSITORY = re.compile(r"https://huggingface\.co/([\w.\-]+/[\w.\-]+)/?")
_NORM = "_norm.weight"
_ALORA_KEY = "adapter.alora.invocation_tokens"


@dataclass(frozen=True, slots=True)
class _Factor:
    """One tensor to be written: where it comes from, its name, dtype and shape, and what is done to its rows."""

    source: GgufTensor
    name: str
    dtype: str
    shape: tuple[int, ...]
    head_rows: int = 0
    turned: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def unpack_gguf(directory: Path, base_config: Mapping[str, Any] | None, max_bytes: int) -> tuple[str, ...]:
    """Rewrite the weights in `directory`, a GGUF file, as a PEFT adapter with its configuration.

    Args:
        base_config: config.json of the base model, which tells the heads.
        max_bytes: of the tensors as they are written.

    Returns:
        What was done, in sentences. The files are new ones: a hard link elsewhere keeps the
        old bytes.

    Raises:
        FormatUnknown: a model, or an adapter of a type or architecture that is not read.
        FileBroken: a broken file, a half of a pair, a tensor that is no part of a LoRA.
        ConfigRefused: heads must be known, and are not.
        TooLarge: more than `max_bytes`, since blocks become float32.
    """
    weights = directory / WEIGHTS_NAME
    header = read_gguf_header(weights)
    family, alpha, pairs, norms = understand_gguf(header, base_config)
    factors = [factor for pair in pairs.values() for factor in pair]
    if sum(factor.size for factor in factors) > max_bytes:
        raise TooLarge(f"The GGUF file's tensors have more than {max_bytes} bytes as a PEFT adapter.")
    _write(weights, factors)
    replaced = (directory / CONFIG_NAME).exists()
    text = json.dumps(_config(header, pairs, alpha), indent=2, sort_keys=True)
    partial = directory / f"{CONFIG_NAME}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(directory / CONFIG_NAME)
    said = [
        f"It was a GGUF file of llama.cpp's architecture {family.name}, and was taken in as a PEFT adapter: "
        f"{len(pairs)} modules, " + (f"alpha {alpha:g}." if alpha else "of scaling 1, since it tells no alpha.")
    ]
    turned = [path for path, pair in pairs.items() if pair[1].head_rows]
    if turned:
        said.append(f"The rows of B of {len(turned)} modules are in transformers' order, for instance {turned[0]!r}.")
    if replaced:
        said.append(f"The {CONFIG_NAME} that was sent along is not used: a GGUF file tells its own alpha.")
    if norms:
        said.append(f"{len(norms)} tensors of norms were left out, as llama.cpp does, for instance {norms[0]!r}.")
    return tuple(said)


def understand_gguf(
    header: GgufHeader, base_config: Mapping[str, Any] | None
) -> tuple[Family, float, dict[str, tuple[_Factor, _Factor]], list[str]]:
    """The architecture, alpha (0 where there is none), path → A and B, and the names of what llama.cpp leaves out.

    Raises:
        FormatUnknown, FileBroken, ConfigRefused: as `unpack_gguf`.
    """
    family = _family(header)
    alpha = _alpha(header)
    return family, alpha, *_pairs(header, family, base_config)


def _family(header: GgufHeader) -> Family:
    kind = header.values.get("adapter.type")
    if kind != "lora":
        raise FormatUnknown(f"The GGUF adapter is of the type {str(kind)[:40]!r}; lora is read.")
    if _ALORA_KEY in header.arrays or _ALORA_KEY in header.values:
        raise FormatUnknown("It is an activated LoRA, which llama.cpp applies after certain tokens only.")
    name = header.values.get("general.architecture")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise FormatUnknown(
            f"The GGUF adapter is for the architecture {str(name)[:40]!r}; read are {', '.join(sorted(FAMILIES))}.",
            hint="Send the PEFT adapter that it was converted from, as safetensors.",
        )
    return family


def _alpha(header: GgufHeader) -> float:
    """0 where there is none."""
    alpha = header.values.get(ALPHA_KEY, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0:
        raise FileBroken(f"{ALPHA_KEY} is {str(alpha)[:40]}, no number from 0 on.")
    return alpha


def _pairs(
    header: GgufHeader, family: Family, base_config: Mapping[str, Any] | None
) -> tuple[dict[str, tuple[_Factor, _Factor]], list[str]]:
    """Path → A and B, and the names of what llama.cpp leaves out."""
    halves: dict[str, dict[str, GgufTensor]] = {}
    norms = []
    for name, tensor in header.tensors.items():
        end = next((end for end in (A_END, B_END) if name.endswith(end)), None)
        if end is not None:
            halves.setdefault(name.removesuffix(end), {})[end] = tensor
        elif name.endswith(_NORM):
            norms.append(name)
        else:
            raise FileBroken(f"{name!r} is no factor of a LoRA: their names end in {A_END} and {B_END}.")
    if not halves:
        raise FormatUnknown("The GGUF file holds no factors.")
    paths = {stem: family.path(stem) for stem in sorted(halves)}
    unknown = [stem for stem, path in paths.items() if path is None]
    if unknown:
        raise FormatUnknown(
            f"{len(unknown)} modules, {unknown[0]!r} the first, are none of {family.name} that are read."
        )
    pairs = {}
    for stem, path in paths.items():
        found = halves[stem]
        assert path is not None
        for end in (A_END, B_END):
            if end not in found:
                raise FileBroken(f"{stem}{end} is missing.")
        pairs[path] = _pair(path, found[A_END], found[B_END], family, base_config)
    return pairs, norms


def _pair(
    path: str, a: GgufTensor, b: GgufTensor, family: Family, base_config: Mapping[str, Any] | None
) -> tuple[_Factor, _Factor]:
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise FileBroken(f"{tensor.name!r} has the shape {tensor.shape}, where a factor is a matrix.")
    turned = path == EMBEDDING
    a_shape = a.shape[::-1] if turned else a.shape
    if a_shape[0] != b.shape[1]:
        raise FileBroken(f"{path}: A has the shape {a_shape} and B {b.shape}; their ranks differ.")
    rows = _rows(path, b.shape[0], base_config) if family.turns(path) else 0
    one = a.encoding == b.encoding and a.encoding.block == 1
    dtype = a.encoding.name if one else "F32"
    ends = ("lora_embedding_A", "lora_embedding_B") if turned else ("lora_A.weight", "lora_B.weight")
    return (
        _Factor(a, f"{PREFIX}{path}.{ends[0]}", dtype, a_shape, turned=turned),
        _Factor(b, f"{PREFIX}{path}.{ends[1]}", dtype, b.shape, head_rows=rows),
    )


def _rows(path: str, d_out: int, base_config: Mapping[str, Any] | None) -> int:
    if base_config is None:
        raise ConfigRefused(
            f"{BASE_CONFIG} of the base model is missing: llama.cpp has the rows of {path} in another order than "
            "transformers, and only the number of heads tells which.",
            hint=f"Send {BASE_CONFIG} of the base model along, or name a registered base model whose folder is here.",
        )
    return head_rows(path, d_out, base_config)


def _config(header: GgufHeader, pairs: Mapping[str, tuple[_Factor, _Factor]], alpha: float) -> dict[str, Any]:
    ranks = {path: pair[0].shape[0] for path, pair in pairs.items()}
    rank = most_common(ranks.values())
    other = {f"^{path}": own for path, own in ranks.items() if own != rank}
    repository = _REPOSITORY.fullmatch(str(header.values.get("general.base_model.0.repo_url", "")))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if repository is None else repository[1],
        "r": rank,
        "lora_alpha": short(alpha) if alpha else rank,
        "target_modules": sorted(pairs),
        "rank_pattern": other,
        "alpha_pattern": {} if alpha else dict(other),
        "bias": "none",
        "inference_mode": True,
    }


def _write(weights: Path, factors: list[_Factor]) -> None:
    """The safetensors file, in place of the GGUF file."""
    # Wider elements first keeps every tensor aligned to its own element size.
    ordered = sorted(factors, key=lambda factor: (-DTYPE_BYTES[factor.dtype], factor.name))
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for factor in ordered:
        end = position + factor.size
        document[factor.name] = {"dtype": factor.dtype, "shape": list(factor.shape), "data_offsets": [position, end]}
        position = end
    partial = weights.with_name(weights.name + ".partial")
    with weights.open("rb") as source, partial.open("wb") as target:
        target.write(packed_header(document))
        for factor in ordered:
            target.writelines(_bytes(source, factor))
    partial.replace(weights)


def _bytes(file: BufferedReader, factor: _Factor) -> Iterator[bytes]:
    """The factor as it stands in a safetensors file."""
    raw = _raw_rows(file, factor)
    if factor.turned:
        whole = b"".join(_converted(raw, factor))
        elements = np.frombuffer(whole, f"<u{DTYPE_BYTES[factor.dtype]}").reshape(factor.source.shape)
        yield np.ascontiguousarray(elements.T).tobytes()
    else:
        yield from _converted(raw, factor)


def _raw_rows(file: BufferedReader, factor: _Factor) -> Iterator[bytes]:
    """The stored bytes, some whole rows or heads at a time, and the rows of a head in transformers' order."""
    rows, width = factor.source.shape
    row_bytes = width // factor.source.encoding.block * factor.source.encoding.bytes
    together = factor.head_rows or 1
    # what is transposed is there as it is stored, joined and turned, each of them as wide as float32 at most
    needed = 3 * 4 * width * rows if factor.turned else row_bytes * together
    if needed > _MOST_AT_ONCE:
        raise FileBroken(f"{factor.source.name!r} of the shape {factor.source.shape} is too wide to be read.")
    step = max(_CHUNK_BYTES // (row_bytes * together), 1) * together
    file.seek(factor.source.begin)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = file.read(count * row_bytes)
        if len(raw) != count * row_bytes:
            raise FileBroken("The file became shorter while it was read.")
        if factor.head_rows:
            heads = np.frombuffer(raw, np.uint8).reshape(-1, factor.head_rows // 2, 2, row_bytes)
            raw = heads.swapaxes(1, 2).tobytes()
        yield raw


def _converted(raw: Iterable[bytes], factor: _Factor) -> Iterator[bytes]:
    encoding = factor.source.encoding
    for piece in raw:
        if encoding.name == factor.dtype:
            yield piece
        elif encoding.block == 1:
            yield encode(decode(piece, encoding.name), factor.dtype)
        else:
            yield _of_blocks(piece)


def _of_blocks(raw: bytes) -> bytes:
    """Q8_0 as float32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = np.frombuffer(raw, np.uint8).reshape(-1, 34)
    return encode(dequantize(blocks, GGMLQuantizationType.Q8_0), "F32")
