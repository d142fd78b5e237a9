"""A tiny base model as config.json alone, and adapters for it as PEFT writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))

from artifacts.layout import WEIGHTS_NAME, read_layout
from artifacts.safetensors_header import read_header
from train.base_files import BaseFiles
from workers.engines import hollow_models, loaded_numbers, stock_loading


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.json and nothing else: no weights are there to be read."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter of random numbers as PEFT does, some of its keys changed; gives its folder."""

    def save(
        config: Any, rename: Callable[[str], str | None] = lambda key: key, kind: str = "LlamaForCausalLM"
    ) -> Path:
        import transformers
        from peft import get_peft_model

        folder = tmp_path / "adapter"
        torch.manual_seed(0)
        model = get_peft_model(getattr(transformers, kind)(transformers.LlamaConfig.from_pretrained(base)), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        renamed = {rename(key): value for key, value in load_file(folder / WEIGHTS_NAME).items()}
        save_file({key: value for key, value in renamed.items() if key is not None}, folder / WEIGHTS_NAME)
        return folder

    return save


@pytest.fixture
def check(base: Path) -> Callable[..., tuple[stock_loading.Loaded, loaded_numbers.Count]]:
    """What an engine makes of a folder; `alone` without the base model."""

    def do(engine: Any, folder: Path, *, task: str | None = None, alone: bool = False) -> Any:
        shapes = {key: info.shape for key, info in read_header(folder / WEIGHTS_NAME).tensors.items()}
        if alone:
            hollow = hollow_models.skeleton_of(read_layout(folder).modules, shapes)
        else:
            hollow = hollow_models.model_of(BaseFiles("base", str(base)), task, shapes)
        loaded = stock_loading.load(engine, hollow, folder)
        found = loaded_numbers.count(
            folder, folder / WEIGHTS_NAME, loaded.components, hollow.placeholders, stock_loading.ADAPTER
        )
        return loaded, found

    return do
