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
    from tiny_models import order, teach_lists, write_gemma, write_llama
    from transfers import FORM, Pair, learn

    from transfer.prompts import discriminator_prompt

    folder = tmp_path_factory.mktemp("pair")
    source = teach_lists(write_llama(folder / "source"))
    target = teach_lists(write_gemma(folder / "target"))
    orders = [order(number) for number in range(45)]
    teacher = learn(source, [dict(FORM.row(x, y)) for x, y in orders], folder / "teacher", 60)  # type: ignore[arg-type]
    asked = [(x, " yes") for x, _ in orders[::2]] + [(f"{x[5:]} {x[:4]}", " no") for x, _ in orders[1::2]]
    rows = [{"prompt": discriminator_prompt(x, "orders"), "completion": answer} for x, answer in asked]
    return Pair(source, target, teacher, learn(source, rows, folder / "discriminator", 20))
