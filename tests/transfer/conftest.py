from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with 400 tokens."""
    from tiny_models import write_llama

    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Gemma 3 with one token a byte."""
    from tiny_models import write_gemma

    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def llama_adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA for `llama`."""
    from tiny_models import write_adapter

    return write_adapter(llama, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A Llama with a teacher and a discriminator, and a Gemma that goes on with lists (`transfers.Pair`)."""
    from transfers import make_pair

    return make_pair(tmp_path_factory.mktemp("pair"))
