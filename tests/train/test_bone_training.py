"""Bone on a language model: how many parameters it has, how it learns, what its ΔW looks like afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from train.catalog import find_method, parse_parameters
from train.protocol import MethodContext
from train.settings import TrainingSettings

R, STEPS = 16, 50
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_llama_2_7b_has_the_87_million_parameters_of_the_paper() -> None:
    options = parse_parameters("bone", {})
    hidden, wide = 4096, 11008
    sides = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]
    assert 32 * sum(options.parameters_of(*each) for each in sides) == 87_031_808


def loss_of(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def trained(base: tuple[Any, Tensor], method_name: str, parameters: dict[str, Any]) -> tuple[Any, Any, list[float]]:
    """(method, trained model, losses before each step and at the end), AdamW at 1e-4 on one batch."""
    model, ids = copy.deepcopy(base[0]), base[1]
    method = find_method(method_name).load(parse_parameters(method_name, {"rank": R, **parameters}))
    targets = sorted(path for path, _ in model.named_modules() if path.rpartition(".")[2] in LAYERS)
    settings = TrainingSettings(learning_rate=1e-4)
    torch.manual_seed(0)
    model = method.prepare(model, MethodContext(targets, STEPS, lambda: iter(()), settings))
    values = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-4, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        losses.append(float(loss_of(model, ids)))
    return method, model, losses


def delta(model: Any, base: Any, path: str) -> Tensor:
    """W' − W of one layer, from its outputs."""
    module = (
        model.get_submodule(path) if not hasattr(model, "peft_config") else model.base_model.model.get_submodule(path)
    )
    W = base.get_submodule(path).weight
    with torch.no_grad():
        return module(torch.eye(W.shape[1])).T - W


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_learns_from_the_loss_of_the_base_and_its_delta_is_of_its_kind(
    smollm2: tuple[Any, Tensor], tmp_path: Path
) -> None:
    base, ids = smollm2
    with torch.no_grad():
        start = float(loss_of(base, ids))
    checksum = sum(float(value.double().sum()) for value in base.parameters())
    found = {
        variant: trained(smollm2, "bone", {"variant": variant}) for variant in ("default", "bat_col", "bat_row")
    } | {"lora": trained(smollm2, "lora", {})}
    path = "model.layers.1.mlp.down_proj"
    for name, (_, model, losses) in found.items():
        assert losses[0] == pytest.approx(start, abs=1e-6), name
        assert losses[-1] < start - 0.05, name
        frozen = [value for key, value in model.named_parameters() if "miss_block" not in key and "lora_" not in key]
        frozen = [value for value in frozen if not value.requires_grad]
        assert sum(float(value.double().sum()) for value in frozen) == pytest.approx(checksum, abs=1e-9)
        repeated = delta(model, base, path)
        # of the layer's own size: a small update must not pass for a repeated one
        difference = float((repeated[:, R:] - repeated[:, :-R]).abs().max())
        assert (difference < 1e-6) is (name == "default"), (name, difference)
    # bat_col, the form that the paper measured, trains as low as the default at least; bat_row lower than LoRA
    assert found["bat_col"][2][-1] <= found["default"][2][-1]
    assert found["bat_row"][2][-1] < found["lora"][2][-1]
    for variant in ("bat_col", "bat_row"):
        values = torch.linalg.svdvals(delta(found[variant][1], base, path))
        assert int((values > 1e-3 * values[0]).sum()) > R
    method, model, _ = found["default"]
    method.export(model, tmp_path / "plain")
    loaded = method.reload(copy.deepcopy(base), tmp_path / "plain")  # stock PEFT's loader
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=0)
