"""LQ-LoRA: training beside packed weights, and an adapter that belongs to them alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from artifacts.adapter import Adapter
from artifacts.base_model import inspect_base
from artifacts.errors import BaseMismatch, FileBroken, RequestInvalid
from artifacts.intake import inspect
from merge.base_output import fold_into_base
from merge.conversion import convert_to_lora
from train import declared
from train.catalog import find_method, parse_parameters
from train.lq_layer import LqLinear
from train.packed_base import fitted, packed_bytes
from train.quantised.packed_linear import PackedLinear
from train.quantised.unpacking import unpack_base
from train.quiet import peft_deprecations_ignored

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


@pytest.fixture(scope="module")
def unpacked(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The packed base model with ordinary weights, the adapter as a plain LoRA on it, and the logits to expect."""
    trainings, _, adapter, _ = trained
    folder = tmp_path_factory.mktemp("unpacked")
    packed = Path(trainings.packed_files.location)
    identities = json.loads((adapter / "adapter_config.json").read_text())["packed_weights"]
    report = unpack_base(packed, folder / "base", identities=identities, progress=lambda part, text: None)
    convert_to_lora(adapter, folder / "lora", unpacked="acme/unpacked")
    with torch.no_grad():
        expected = declared.load(load(str(packed)), adapter)(IDS).logits
    return folder, report, expected


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@torch.no_grad()
def test_unpacked_stock_peft_computes_what_was_trained(trained: Any, unpacked: Any, tiny_base: Path) -> None:
    from peft import PeftModel

    folder, report, expected = unpacked
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 4, "acme/unpacked")
    base = stock(folder / "base")
    packed = load(trained[0].packed_files.location)
    names = [path for path, module in packed.named_modules() if isinstance(module, PackedLinear)]
    assert report.matrices == len(names) == 14
    assert report.rounding == 0
    for path in names:
        assert torch.equal(base.get_submodule(path).weight, packed.get_submodule(path).weight)
    assert not any("quantisation" in path.name for path in (folder / "base").iterdir())
    assert inspect_base(folder / "base").quantisation is None
    assert load_file(folder / "base/model.safetensors").keys() == load_file(tiny_base / "model.safetensors").keys()
    with peft_deprecations_ignored():
        model = PeftModel.from_pretrained(base, folder / "lora")
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert float((model(IDS).logits - expected).abs().max()) > 1e-2, "the factors change nothing"


@pytest.mark.parametrize(("dtype", "rounding", "difference"), [("float32", 1e-6, 1e-5), ("bfloat16", 2e-3, 1e-2)])
@torch.no_grad()
def test_merged_it_is_one_ordinary_model(
    unpacked: Any, tmp_path: Path, dtype: Any, rounding: float, difference: float
) -> None:
    folder, _, expected = unpacked
    fold_into_base(folder / "base", folder / "lora", tmp_path / "merged", dtype=dtype, force=True)
    model = stock(tmp_path / "merged")
    assert model.dtype == getattr(torch, dtype)
    logits = model.float()(IDS).logits
    assert float((logits - expected).norm() / expected.norm()) < difference
    exact = stock(folder / "base")
    lora = Adapter.open(folder / "lora")
    wanted = {path: exact.get_submodule(path).weight + factors.B @ factors.A for path, factors in lora.items()}
    lost = sum(float((model.get_submodule(path).weight - weight).square().sum()) for path, weight in wanted.items())
    assert (lost / sum(float(weight.square().sum()) for weight in wanted.values())) ** 0.5 < rounding


def test_sixteen_bits_round_q_once_and_say_how_much(trained: Any, tmp_path: Path) -> None:
    packed = Path(trained[0].packed_files.location)
    report = unpack_base(packed, tmp_path / "half", dtype="bfloat16", progress=lambda part, text: None)
    assert 5e-4 < report.rounding < 2.5e-3
    exact, half = load(str(packed)), stock(tmp_path / "half")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}
    for path, layer in exact.named_modules():
        if isinstance(layer, PackedLinear):
            assert torch.equal(half.get_submodule(path).weight, layer.weight.to(torch.bfloat16))
    assert torch.equal(half.model.embed_tokens.weight, exact.model.embed_tokens.weight.to(torch.bfloat16))


def test_other_packed_weights_are_not_unpacked_for_the_adapter(trained: Any, tmp_path: Path) -> None:
    packed = Path(trained[0].packed_files.location)
    identities = dict(json.loads((trained[2] / "adapter_config.json").read_text())["packed_weights"])
    first = min(identities)
    for wrong, words in (
        ({**identities, first: "0" * 64}, "not the one that the adapter was trained on"),
        ({"model.layers.9.mlp.up_proj": "0" * 64}, "no such packed layer"),
        ({}, "names no packed layer"),
    ):
        with pytest.raises(BaseMismatch, match=words):
            unpack_base(packed, tmp_path / "out", identities=wrong, progress=lambda part, text: None)
    assert not (tmp_path / "out").exists()


def change_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


LAYER = "model.layers.0.mlp.up_proj"
BROKEN: dict[str, tuple[Any, type[Exception], str]] = {
    "another codebook": (lambda told: told.update(codebook="nf-v2"), RequestInvalid, "codebook 'nf-v2' is not known"),
    "another method": (lambda told: told.update(quant_method="awq"), RequestInvalid, "not packed"),
    "no format": (lambda told: told["layers"][LAYER].pop("format"), FileBroken, "not whole"),
    "odd bits": (lambda told: told["layers"][LAYER].update(format=[5, 4, "bfloat16", 16, 16]), FileBroken, "no format"),
    "other sides": (lambda told: told["layers"][LAYER].update(shape=[64, 64]), FileBroken, "up_proj.codes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_contradicts_itself_is_refused(trained: Any, tmp_path: Path, name: str) -> None:
    change, error, words = BROKEN[name]
    folder = Path(shutil.copytree(trained[0].packed_files.location, tmp_path / "packed"))
    change_config(folder, change)
    with pytest.raises(error, match=words):
        unpack_base(folder, tmp_path / "out", progress=lambda part, text: None)
    assert not (tmp_path / "out").exists()


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
