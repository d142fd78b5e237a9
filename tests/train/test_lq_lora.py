"""LQ-LoRA: training beside packed weights, and an adapter that belongs to them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts.adapter import Adapter
from artifacts.base_model import inspect_base
from artifacts.errors import BaseMismatch, RequestInvalid
from artifacts.intake import inspect
from merge.conversion import convert_to_lora
from train import declared
from train.catalog import find_method, parse_parameters
from train.lq_layer import LqLinear
from train.packed_base import fitted, packed_bytes
from train.quantised.packed_linear import PackedLinear

IDS = torch.arange(1, 41).view(1, -1)


def load(folder: str, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    from train.base_files import BaseFiles

    return BaseFiles("acme/tiny", folder).load(AutoModelForCausalLM, "language model", dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from trainings import Trainings

    trainings = Trainings(tmp_path_factory.mktemp("lq-lora"), tiny_base)
    return trainings, *trainings.run("lq-lora", {"alpha": 2}, steps=3)


@pytest.mark.parametrize("scaling", [0.25, 2.0])
def test_a_layer_begins_at_q_and_its_factors_whatever_the_scaling(trained: Any, scaling: float) -> None:
    trainings = trained[0]
    factors = load_file(Path(trainings.packed_files.location) / "start_factors.safetensors")
    model = load(trainings.packed_files.location)
    path, packed = next(item for item in model.named_modules() if isinstance(item[1], PackedLinear))
    layer = LqLinear(packed, 4, scaling)
    left, right = factors[f"{path}.L1"], factors[f"{path}.L2"]
    layer.begin(left, right)
    x = torch.randn(3, layer.d_in, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ (packed.weight + left @ right).T, rtol=0, atol=1e-5)


def test_before_the_training_the_model_is_q_with_its_factors(trained: Any, tiny_base: Path) -> None:
    """Without them it would begin at a worse loss than the original, by what quantising alone loses."""
    trainings, report, _, _ = trained
    told = trainings.run("lora", {"rank": 4}, steps=1)[0].evaluation["before"]["loss"]
    begun = report.evaluation["before"]["loss"]
    from train.data import DataFile  # the held-out rows are those of every training

    assert isinstance(trainings.data, DataFile)
    assert begun == pytest.approx(told, abs=0.25)
    assert report.evaluation["after"]["loss"] < begun
    assert report.reload["largest_difference"] <= 1e-4 < report.reload["effect"]


def test_the_report_tells_the_bits_and_the_bytes(trained: Any) -> None:
    _, report, _, _ = trained
    told = report.own["quantisation"]
    weights = 15360
    assert 2.5 < told["bits_per_weight"] <= 3
    assert told["resident_bytes"] <= 1.05 * weights * told["bits_per_weight"] / 8
    assert report.trainable_parameters == report.estimate["trainable_parameters"]


def test_the_adapter_is_of_its_own_type_and_not_merged(trained: Any) -> None:
    _, _, adapter, _ = trained
    manifest = inspect(adapter)
    assert (manifest.method, manifest.mergeable, manifest.rank) == ("lq_lora", False, 4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_alpha"]) == ("RANKWISE_LQ_LORA", 2)
    assert 0 < config["quantisation_error"] < 0.3


def test_the_original_base_is_refused(trained: Any, tiny_base: Path) -> None:
    trainings, _, adapter, _ = trained
    with pytest.raises(BaseMismatch):
        declared.load(trainings.load_base(), adapter)


def test_a_base_that_was_quantised_otherwise_is_refused(trained: Any) -> None:
    trainings, _, adapter, _ = trained
    other = load(trainings.packed_files.location)
    layer = other.model.layers[0].mlp.up_proj
    layer.codes[0] ^= 1
    with pytest.raises(BaseMismatch, match="not the one that the adapter was trained on"):
        declared.load(other, adapter)


def test_without_packed_weights_it_is_refused_even_if_the_norms_agree(trained: Any) -> None:
    trainings, _, adapter, _ = trained
    dense = load(trainings.packed_files.location)
    for path, layer in list(dense.named_modules()):
        if isinstance(layer, PackedLinear):
            parent, _, name = path.rpartition(".")
            setattr(dense.get_submodule(parent), name, layer.dense())
    with pytest.raises(BaseMismatch, match="not quantised"):
        declared.load(dense, adapter)


def test_folded_it_is_the_same_model_without_us(trained: Any, tmp_path: Path) -> None:
    trainings, _, adapter, _ = trained
    model = declared.load(load(trainings.packed_files.location), adapter)
    with torch.no_grad():
        expected = model(IDS).logits
        folded = declared.fold(model)
        torch.testing.assert_close(folded(IDS).logits, expected, rtol=0, atol=1e-4)
        folded.save_pretrained(tmp_path)
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-4)


def test_converted_it_is_what_the_training_changed_on_the_original_weights(
    trained: Any, tiny_base: Path, tmp_path: Path
) -> None:
    """s'·B'·A' = s·(B·A − B₀·A₀), so that (W − E) + ΔW is the trained weight, with E what quantising had lost."""
    trainings, _, adapter, _ = trained
    report = convert_to_lora(adapter, tmp_path / "lora")
    assert (report.exact, report.rank) == (True, 8)
    plain = Adapter.open(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    stored = load_file(adapter / "adapter_model.safetensors")
    begun = load_file(Path(trainings.packed_files.location) / "start_factors.safetensors")
    ours = declared.load(load(trainings.packed_files.location), adapter)
    for path, factors in plain.items():
        A, B, A0, B0 = (
            stored[f"base_model.model.{path}.{name}"].double() for name in ("lora_A", "lora_B", "start_A", "start_B")
        )
        expected = 0.5 * (B @ A - B0 @ A0)
        delta = factors.scaling * factors.B.double() @ factors.A.double()
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6)
        layer = ours.get_submodule(path)
        kept = layer.weight.double() + begun[f"{path}.L1"].double() @ begun[f"{path}.L2"].double()
        torch.testing.assert_close(kept + delta, layer.weight.double() + layer.delta().double(), rtol=0, atol=1e-5)


def test_only_the_factors_are_trained(trained: Any) -> None:
    _, _, adapter, _ = trained
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in stored} == {"lora_A", "lora_B", "start_A", "start_B"}
    pairs = [(key, key.replace("lora_", "start_")) for key in stored if ".lora_" in key]
    assert sum(not torch.equal(stored[now], stored[before]) for now, before in pairs) == len(pairs) == 28


def test_bfloat16_trains_on_the_same_packed_weights(trained: Any) -> None:
    trainings, report, _, _ = trained
    half = trainings.run("lq-lora", steps=2, precision="bfloat16")[0]
    assert half.own["quantisation"] == report.own["quantisation"]
    assert half.reload["largest_difference"] <= half.reload["tolerance"]


REFUSED: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "an unquantised base": ("lq-lora", {}, False, "/base_model"),
    "another method": ("lora", {}, True, "/base_model"),
    "another rank": ("lq-lora", {"rank": 5}, True, "/parameters/rank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_base_is_refused(trained: Any, tiny_base: Path, name: str) -> None:
    method, parameters, packed, pointer = REFUSED[name]
    folder = Path(trained[0].packed_files.location) if packed else tiny_base
    with pytest.raises(RequestInvalid) as caught:
        fitted(find_method(method), parse_parameters(method, parameters), inspect_base(folder).quantisation)
    assert caught.value.errors[0].pointer == pointer


@pytest.mark.parametrize("given", [{"dropout": 0.1}, {"target_modules": ["q_proj"]}, {"bits": 4}])
def test_parameters_that_would_disturb_the_base_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters("lq-lora", given)
    assert caught.value.errors[0].pointer == f"/parameters/{next(iter(given))}"


def test_the_packed_bytes_are_known_before_anything_is_loaded(trained: Any) -> None:
    folder = Path(trained[0].packed_files.location)
    told = packed_bytes(inspect_base(folder).quantisation)
    model = load(str(folder))
    for path, size in told.items():
        assert size == sum(buffer.numel() * buffer.element_size() for buffer in model.get_submodule(path).buffers())
