"""Models that come as GGUF files inside PyPI packages, as directories that transformers loads at once.

Reading a GGUF takes the better part of a minute, so each is converted once per machine to fp32 safetensors, in a cache
keyed by the SHA-256 of the GGUF file: ``$RANKWISE_MODEL_CACHE/<sha256>`` (by default
``~/.cache/rankwise/models/<sha256>``).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "RANKWISE_MODEL_CACHE"

_BLOCK = 1 << 20


class BaseModelUnavailableError(RuntimeError):
    """The package that carries the model is not installed, or not as expected."""


def package_folders(import_name: str) -> list[Path]:
    """The folders of an installed package, found without importing it; none when it is not installed."""
    spec = importlib.util.find_spec(import_name)
    return [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]


def cache_root() -> Path:
    """The folder that holds converted models, one directory per GGUF digest."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "rankwise" / "models"


def converted_directory(parts: Sequence[Path], convert: Callable[[Path, Path], None]) -> Path:
    """The converted model's directory; converts first when this machine has not done so yet.

    Safe to call from several processes at once: one converts, the others wait for it. The directory appears under its
    final name only when it is complete, so a conversion that was killed leaves nothing that looks usable.

    parts: the GGUF file, or the pieces that it is cut into, in order.
    convert: ``convert(gguf, destination)`` fills an existing empty directory.
    """
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    digest = _sha256(parts)
    destination = root / digest
    if destination.is_dir():
        return destination
    with _exclusive(root / f"{digest}.lock"):
        if destination.is_dir():
            return destination
        # Only the holder of the lock makes partial directories, so any that is here was left by a killed process.
        for leftover in root.glob(f".{digest}-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(prefix=f".{digest}-", dir=root) as scratch:
            source = _joined(parts, Path(scratch))
            partial = Path(scratch) / "model"
            partial.mkdir(mode=0o755)
            convert(source, partial)
            _flush(partial)
            partial.rename(destination)
    return destination


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Dequantise a GGUF model to fp32 safetensors with config, generation config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the model keeps a GGUF quantiser object, and save_pretrained refuses to serialise it.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def _joined(parts: Sequence[Path], scratch: Path) -> Path:
    """The parts as one file: the only one as it lies, several written one after another."""
    if len(parts) == 1:
        return parts[0]
    whole = scratch / "model.gguf"
    with whole.open("wb") as output:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, output, _BLOCK)
    return whole


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the kernel frees it when the process dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _flush(directory: Path) -> None:
    """Write the files' contents to disk, so that a crash after the rename cannot leave a torn model in the cache."""
    for path in directory.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def _sha256(parts: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        with part.open("rb") as handle:
            while block := handle.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
