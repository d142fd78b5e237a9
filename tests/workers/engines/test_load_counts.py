"""What PEFT and transformers themselves make of adapters: whole, in part, not at all, and told so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, VeraConfig
from transformers import LlamaConfig

from artifacts.errors import RequestInvalid
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME
from train.base_files import BaseFiles
from workers.engines import hollow_models, loaded_numbers, stock_loading

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

TARGETS = ["q_proj", "v_proj"]
PREFIX = "base_model.model."


@pytest.fixture
def plain() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, rank_pattern={"v_proj": 1}, task_type="CAUSAL_LM")


def test_a_whole_adapter_loads_with_its_numbers_ranks_and_scalings(saved: Any, check: Any, plain: LoraConfig) -> None:
    folder = saved(plain)
    for engine, alone in (("peft", False), ("transformers", False), ("peft", True)):
        loaded, found = check(engine, folder, alone=alone)
        assert (loaded.refusal, loaded.warnings) == (None, [])
        assert (found.verdict, found.loaded, found.compared, found.tensors) == ("loads", 4, 4, 8)


def test_names_that_peft_passes_over_leave_untrained_layers(saved: Any, check: Any, plain: LoraConfig) -> None:
    """PEFT puts its layers in, fills none, and warns of it; the file's names are those of the bare model."""
    folder = saved(plain, lambda key: key.removeprefix(PREFIX))
    loaded, found = check("peft", folder)
    assert (loaded.refusal, found.verdict, found.loaded) == (None, "nothing", 0)
    assert len(found.missing) == len(found.unexpected) == 8
    assert found.report()["modules"]["not_loaded"][0] == "model.layers.0.self_attn.q_proj"
    assert "Found missing adapter keys" in loaded.warnings[0]
    assert check("peft", folder, alone=True)[1].verdict == "nothing"


@pytest.mark.parametrize("engine", ["peft", "transformers"])
def test_a_file_with_half_of_the_layers_is_part_of_an_adapter(
    saved: Any, check: Any, plain: LoraConfig, engine: str
) -> None:
    _, found = check(engine, saved(plain, lambda key: None if ".0." in key else key))
    assert (found.verdict, found.loaded, len(found.missing)) == ("partly", 2, 4)
    assert all("layers.0." in name for name in found.missing)


def test_one_tensor_that_finds_no_place_is_named(saved: Any, check: Any, plain: LoraConfig) -> None:
    gone = f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"
    _, found = check("peft", saved(plain, lambda key: key.replace("layers.1", "layers.7") if key == gone else key))
    assert found.verdict == "partly"
    assert found.unexpected == [gone.replace("layers.1", "layers.7")]
    assert found.missing == [gone.replace(".weight", ".default.weight")]


def test_a_scaling_that_the_engine_has_otherwise_is_told(
    saved: Any, check: Any, plain: LoraConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that ignores the field: what it applies is another ΔW, whatever it loaded."""
    from peft.tuners.lora import LoraLayer

    folder = saved(LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_rslora=True))
    right = LoraLayer.update_layer
    monkeypatch.setattr(
        LoraLayer,
        "update_layer",
        lambda self, *given, **named: (
            right(self, *given, **named) or self.scaling.update(dict.fromkeys(self.scaling, 1.5))
        ),
    )
    _, found = check("peft", folder)
    assert (found.verdict, found.loaded, len(found.differences)) == ("changes", 4, 4)
    assert found.differences[0]["engine_scaling"] == 1.5
    assert found.differences[0]["scaling"] == pytest.approx(3 / 2**0.5)


def test_magnitudes_of_dora_are_loaded_by_peft_and_not_by_transformers(saved: Any, check: Any) -> None:
    """As in transformers 5.23: its names of the magnitudes lack the `.weight` of the layer's."""
    folder = saved(LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    assert check("peft", folder)[1].verdict == "loads"
    _, found = check("transformers", folder)
    assert (found.verdict, found.loaded, len(found.missing), len(found.unexpected)) == ("partly", 0, 4, 4)
    assert all("lora_magnitude_vector" in name for name in [*found.missing, *found.unexpected])


def test_prompt_tuning_is_loaded_by_peft_and_refused_by_transformers(saved: Any, check: Any) -> None:
    folder = saved(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    _, found = check("peft", folder)
    assert (found.verdict, found.modules) == ("loads", {"prompt_embeddings": True})
    loaded, _ = check("transformers", folder)
    assert loaded.refusal is not None
    assert loaded.refusal["type"] == "ValueError"
    assert "prompt learning" in loaded.refusal["message"]


def test_a_classifier_gets_its_head_on_a_base_without_one(saved: Any, check: Any) -> None:
    config = LoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS")
    folder = saved(config, kind="LlamaForSequenceClassification")
    for alone in (False, True):
        _, found = check("peft", folder, task="SEQ_CLS", alone=alone)
        assert (found.verdict, found.loaded, found.compared) == ("loads", 5, 4)


def test_an_adapter_of_embeddings_goes_into_the_bare_model(saved: Any, check: Any) -> None:
    folder = saved(LoraConfig(r=2, target_modules=TARGETS, task_type="FEATURE_EXTRACTION"), kind="LlamaModel")
    _, found = check("peft", folder, task="FEATURE_EXTRACTION")
    assert (found.verdict, found.loaded, found.compared) == ("loads", 4, 4)


def test_an_initialisation_that_decomposes_the_base_needs_none(saved: Any, check: Any) -> None:
    folder = saved(LoraConfig(r=2, target_modules=TARGETS))
    document = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(document | {"init_lora_weights": "pissa"}))
    assert check("peft", folder)[1].verdict == "loads"


def test_what_the_library_raises_is_the_answer(saved: Any, check: Any, plain: LoraConfig) -> None:
    folder = saved(plain)
    document = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(document | {"target_modules": ["nowhere"]}))
    loaded, _ = check("peft", folder)
    assert loaded.refusal is not None
    assert "nowhere" in loaded.refusal["message"]
    assert str(folder.parent) not in str(loaded.refusal)


@pytest.mark.parametrize(
    "document",
    [
        {"model_type": "llama", "architectures": ["os.system"]},
        {"model_type": "llama", "architectures": ["LlamaConfig"]},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "nothing"},
        {"model_type": "llama", "architectures": 3},
        {"model_type": "llama", "rope_scaling": 5},
        {"model_type": "llama", "torch_dtype": 7},
        {"model_type": "llama", "id2label": ["a"]},
        {"model_type": "llama", "num_labels": "two"},
        {"model_type": ["llama"]},
        [],
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
    ],
)
def test_a_base_that_no_class_of_transformers_is_made_of(tmp_path: Path, document: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(RequestInvalid, match="can not be"):
        hollow_models.model_of(BaseFiles("odd", str(tmp_path)), None, {})


def changed(folder: Path, **fields: Any) -> Path:
    document = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(document | fields))
    return folder


def test_modules_to_save_that_are_not_in_the_file_take_no_memory(
    saved: Any, plain: LoraConfig, base: Path, tmp_path: Path
) -> None:
    """The libraries copy them whole before they read the file: 38 GB here, for a file of a few kB."""
    folder = changed(saved(plain), modules_to_save=["mlp"])
    config = LlamaConfig.from_pretrained(base, intermediate_size=100_000_000)
    config.save_pretrained(tmp_path / "wide")

    def load(engine: Any) -> Any:
        hollow = hollow_models.model_of(BaseFiles("wide", str(tmp_path / "wide")), None, {})
        return hollow, stock_loading.load(engine, hollow, folder)

    _, loaded = load("peft")
    assert loaded.refusal == {
        "type": "KeyError", "message": "'base_model.model.model.layers.0.mlp.gate_proj.weight'",
    }  # fmt: skip
    hollow, loaded = load("transformers")
    assert loaded.refusal is None
    found = loaded_numbers.count(
        folder, folder / WEIGHTS_NAME, loaded.components, hollow.placeholders, stock_loading.ADAPTER
    )
    assert (found.verdict, found.loaded, len(found.missing)) == ("partly", 4, 6)
    assert all(".mlp.modules_to_save." in name for name in found.missing)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {"num_virtual_tokens": 60_000_000}),
        (VeraConfig(r=2, target_modules=TARGETS), {"r": 200_000_000, "save_projection": False}),
    ],
)
def test_a_configuration_that_asks_for_more_memory_than_its_file_is_refused(
    saved: Any, check: Any, config: Any, fields: dict[str, Any]
) -> None:
    folder = changed(saved(config), **fields)
    with pytest.raises(RequestInvalid, match="asks for more than 2048 MiB") as caught:
        check("peft", folder)
    assert [item.pointer for item in caught.value.errors] == ["/adapter"]
    name = next(iter(fields))
    assert f"{CONFIG_NAME} says {name} = {fields[name]}, and no side of a tensor is above " in caught.value.detail
    assert caught.value.detail.endswith(".")
    assert "inference_mode" not in caught.value.detail, "true is no number"


def test_a_hollow_model_takes_no_memory(base: Path) -> None:
    hollow = hollow_models.model_of(BaseFiles("base", str(base)), None, {})
    tensors = [*hollow.target.parameters(), *hollow.target.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) <= 16
    assert hollow.target.get_input_embeddings().weight.shape == (40, 16)
