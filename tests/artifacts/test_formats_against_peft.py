"""The deltas of every layout of the corpus that stock PEFT loads whole are PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.errors import RankwiseError
from artifacts.layout import AdapterLayout
from artifacts.manifest import LoraModule
from scripts.formats_report import document_of, layouts, read

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NOT_WHOLE = {"peft/var-fsdp-wrapped", "peft/var-orig_mod"}
"""PEFT leaves all of their tensors out, and says no more than a warning: names that wrappers left."""


def candidates() -> dict[str, AdapterLayout]:
    """Layouts of mergeable LoRAs with a configuration of PEFT."""
    found = {}
    for name, layout in layouts().items():
        document = document_of(layout)
        if document is None or document.get("peft_type", "LORA") != "LORA":
            continue
        try:
            understood = read(layout)
        except RankwiseError:
            continue
        if not understood.refusals:
            found[name] = understood
    return found


def small(modules: tuple[LoraModule, ...]) -> dict[int, int]:
    """Side → a small one, another for each."""
    sides = {side for module in modules for side in (module.a_shape[1], module.b_shape[0])}
    return {side: 6 + 2 * number for number, side in enumerate(sorted(sides))}


def write(folder: Path, understood: AdapterLayout, document: Any) -> dict[str, Tensor]:
    """The factors and biases with small sides; what else a file may hold, as copies of layers, is no part of ΔW."""
    torch.manual_seed(0)
    folder.mkdir()
    sizes = small(understood.modules)
    shapes = {}
    for module in understood.modules:
        shapes[module.a_key] = (module.a_shape[0], sizes[module.a_shape[1]], *module.a_shape[2:])
        shapes[module.b_key] = (sizes[module.b_shape[0]], *module.b_shape[1:])
        if module.bias_key is not None:
            shapes[module.bias_key] = (sizes[module.b_shape[0]],)
    tensors = {key: torch.randn(shape) for key, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return tensors


def base_of(adapter: Adapter) -> nn.Module:
    """A model that has the adapter's modules, and as many rows and columns as its factors."""
    from transformers.pytorch_utils import Conv1D

    root = nn.Module()
    for path, module in adapter.modules.items():
        made: nn.Module
        if module.kind == "embedding":
            made = nn.Embedding(module.d_in, module.d_out)
        elif module.kind == "conv":
            made = nn.Conv2d(module.a_shape[1], module.d_out, module.a_shape[2:])  # type: ignore[arg-type]
        elif adapter.config.fan_in_fan_out:
            made = Conv1D(module.d_out, module.d_in)
        else:
            made = nn.Linear(module.d_in, module.d_out)
        parent = root
        *above, last = path.split(".")
        for level in above:
            if level not in parent._modules:
                parent.add_module(level, nn.Module())
            parent = parent.get_submodule(level)
        parent.add_module(last, made)
    return root


def test_deltas_are_those_of_peft(tmp_path: Path) -> None:
    known = candidates()
    assert len(known) >= 35
    not_whole = set()
    for number, (name, understood) in enumerate(known.items()):
        document = dict(document_of(layouts()[name]))
        tensors = write(tmp_path / str(number), understood, document)
        ours = Adapter.open(tmp_path / str(number))
        layers = peft_layers(tmp_path / str(number), tensors, ours)
        if layers is None:
            not_whole.add(name)
            continue
        assert layers.keys() == ours.keys(), name
        for path, found in ours.items():
            expected = layers[path].get_delta_weight("default").detach()
            if ours.config.fan_in_fan_out or ours.modules[path].kind == "embedding":
                expected = expected.T
            delta = (found.scaling * found.B @ found.A).reshape(expected.shape)
            assert float((delta - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), (name, path)
    assert not_whole == NOT_WHOLE


def peft_layers(folder: Path, tensors: dict[str, Tensor], ours: Adapter) -> dict[str, Any] | None:
    """Path → layer of a model that PEFT has loaded the adapter into; None where it leaves tensors out."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    config.task_type = None
    if config.target_modules == "all-linear":  # which PEFT takes for models of transformers only
        config.target_modules = sorted({path.rpartition(".")[2] for path in ours})
    model = PeftModel(base_of(ours), config)
    told = set_peft_model_state_dict(model, {key: value.clone() for key, value in tensors.items()})
    if told.unexpected_keys or any("lora_" in key for key in told.missing_keys):
        return None
    return {path: layer for path, layer in model.base_model.model.named_modules() if hasattr(layer, "scaling")}
