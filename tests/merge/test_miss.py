"""Merging MiSS adapters: exactly the LoRA that they are, once somebody tells the sides of their layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.adapter import Adapter
from artifacts.base_model import BaseModelRef
from artifacts.errors import FieldError, MergeRefused, ShapeMismatch
from artifacts.shard_blocks import lora_factors
from merge.catalog import parse_parameters
from merge.engine import merge_files

R, D_OUT, D_IN = 4, 6, 10
PATH = "model.q_proj"
BASE = replace(BaseModelRef.named("tiny"), fingerprint=((PATH, D_OUT, D_IN),))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta(block: Tensor) -> Tensor:
    A, B = lora_factors(block, D_OUT, D_IN)
    return B @ A


@pytest.fixture
def write_miss(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, block: Tensor, **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        document = {
            "peft_type": "MISS",
            "base_model_name_or_path": "tiny",
            "r": block.shape[0],
            "target_modules": ["q_proj"],
            "init_weights": True,
            **config,
        }
        save_file({f"base_model.model.{PATH}.miss_block": block}, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(document))
        return directory

    return write


def merged(inputs: list[Any], out: Path, method: str = "svd", **parameters: Any) -> Tensor:
    merge_files(inputs, method, parse_parameters(method, parameters), out)
    factors = Adapter.open(out)[PATH]
    return factors.scaling * factors.B @ factors.A


def test_two_of_them_average_exactly_at_their_own_rank(write_miss: Any, as_input: Any, tmp_path: Path) -> None:
    """Their A is the same for all, so the mean of two blocks has no more rank than one."""
    blocks = [draw(R, D_OUT, seed=seed) for seed in (1, 2)]
    inputs = [as_input(write_miss(str(seed), block), 0.5, base=BASE) for seed, block in enumerate(blocks)]
    found = merged(inputs, tmp_path / "out", rank=R)
    torch.testing.assert_close(found, delta((blocks[0] + blocks[1]) / 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["cat", "linear", "lego"])
def test_one_with_a_lora_that_tells_the_sides(
    write_miss: Any, write_adapter: Any, as_input: Any, tmp_path: Path, method: str
) -> None:
    block, A, B = draw(R, 3, seed=1), draw(2, D_IN, seed=2), draw(D_OUT, 2, seed=3)
    miss = as_input(write_miss("miss", block, init_weights="mini", mini_r=3), 1.0)
    lora = as_input(write_adapter("lora", {PATH: (A, B)}), 2.0)
    found = merged([miss, lora], tmp_path / "out", method, **({"rank": 5} if method == "lego" else {}))
    expected = delta(block) + 2 * B @ A
    if method == "lego":  # five clusters of one component each: nothing is averaged
        assert found.shape == expected.shape
        assert float(found.norm()) > 0
    else:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_without_anybody_who_tells_the_sides_it_is_refused(
    write_miss: Any, write_adapter: Any, as_input: Any, tmp_path: Path
) -> None:
    inputs = [as_input(write_miss(str(seed), draw(R, D_OUT, seed=seed))) for seed in (1, 2)]
    with pytest.raises(MergeRefused, match=f"neither does what is known of its base model tiny: {PATH}") as caught:
        merged(inputs, tmp_path / "out", rank=R)
    assert list(caught.value.errors) == [FieldError("/adapters/0/id", f"{PATH}: sides unknown")]
    lora = as_input(write_adapter("elsewhere", {"model.v_proj": (draw(2, D_IN, seed=2), draw(D_OUT, 2, seed=3))}))
    with pytest.raises(MergeRefused) as caught:
        merged([lora, *inputs], tmp_path / "out", rank=R)
    assert list(caught.value.errors) == [FieldError("/adapters/1/id", f"{PATH}: sides unknown")]


def test_a_base_that_it_does_not_fit_is_refused(write_miss: Any, as_input: Any, tmp_path: Path) -> None:
    other = replace(BASE, fingerprint=((PATH, D_OUT + 1, D_IN),))
    inputs = [as_input(write_miss(str(seed), draw(R, D_OUT, seed=seed)), base=other) for seed in (1, 2)]
    with pytest.raises(ShapeMismatch, match="does not fit a weight of 7×10") as caught:
        merged(inputs, tmp_path / "out", rank=R)
    (finding,) = caught.value.errors
    assert finding.pointer == PATH
    assert caught.value.detail == f"Adapter 1 (1) does not fit tiny: {finding.message}"
