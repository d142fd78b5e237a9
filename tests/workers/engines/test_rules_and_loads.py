"""The rules of `artifacts.compatibility` for PEFT and transformers say what a real load does.

Three answers are compared for every type of adapter: the rule's; that of the load check, on a model without weights;
and whether the model with weights gives the same logits with the loaded adapter as with the one that was saved.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from artifacts import intake
from artifacts.compatibility import NO_LAYERS, SHARED_STATE, findings, loads
from artifacts.engine_outlook import planned
from artifacts.errors import RankwiseError
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, AdapterLayout
from artifacts.loading import why_not_counted
from artifacts.manifest import PEFT_FORMATS, AdapterManifest
from artifacts.peft_fields import OTHER_PEFT_TYPES
from scripts.formats_report import document_of, layouts, read
from train.base_files import BaseFiles
from workers.engines import hollow_models, loaded_numbers, stock_loading

QV = ["q_proj", "v_proj"]
IDS = torch.arange(1, 9)[None]
ENGINES: tuple[Literal["peft", "transformers"], ...] = ("peft", "transformers")


@dataclass(frozen=True)
class Kind:
    """An adapter: the class of its configuration, what it is given, and how keys are renamed after it was saved."""

    config: str
    given: dict[str, Any] = field(default_factory=dict)
    rename: Callable[[str], str] = lambda key: key


def lora(rename: Callable[[str], str] = lambda key: key, **given: Any) -> Kind:
    return Kind("LoraConfig", {"r": 2, "target_modules": QV, "task_type": "CAUSAL_LM"} | given, rename)


def layered(config: str, **given: Any) -> Kind:
    return Kind(config, {"target_modules": QV} | given)


KINDS: dict[str, Kind] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True, r=4),
    "patterns": lora(rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 3}),
    "dora": lora(use_dora=True),
    "dora and rslora": lora(use_dora=True, use_rslora=True),
    "dora with .weight": lora(lambda key: re.sub(r"magnitude_vector$", r"\g<0>.weight", key), use_dora=True),
    "dora with .default": lora(lambda key: re.sub(r"magnitude_vector$", r"\g<0>.default", key), use_dora=True),
    "dora of embeddings": lora(use_dora=True, target_modules=["embed_tokens"]),
    "biases": lora(bias="all"),
    "biases of lora_B": lora(lora_bias=True),
    "whole head": lora(modules_to_save=["lm_head"]),
    "embeddings": lora(target_modules=[*QV, "embed_tokens"]),
    "tokens": lora(trainable_token_indices=[1, 2]),
    "alora": lora(alora_invocation_tokens=[1, 2]),
    "qalora": lora(use_qalora=True, qalora_group_size=4),
    "one layer": lora(layers_to_transform=[1], layers_pattern="layers"),
    "expression": lora(target_modules=r".*q_proj"),
    "all-linear": lora(target_modules="all-linear"),
    "parameters": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "kasa": lora(kasa_config=peft.KasaConfig()),
    "no prefix": lora(lambda key: key.removeprefix("base_model.model.")),
    "compiled": lora(lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.")),
    "compiled layer": lora(lambda key: key.replace(".layers.0.", ".layers.0._orig_mod.")),
    "data parallel": lora(lambda key: f"module.{key}"),
    "sharded": lora(lambda key: key.replace(".layers.0.", ".layers.0._fsdp_wrapped_module.")),
    "checkpointed": lora(lambda key: key.replace(".self_attn.", ".self_attn._checkpoint_wrapped_module.")),
    "name in keys": lora(lambda key: re.sub(r"(lora_[AB])\.", r"\1.default.", key)),
    "adalora": layered("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "ia3": Kind("IA3Config", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "loha": layered("LoHaConfig", r=2, modules_to_save=["lm_head"]),
    "lokr": layered("LoKrConfig", r=8, decompose_both=True),
    "oft": layered("OFTConfig", oft_block_size=4),
    "boft": layered("BOFTConfig", boft_block_size=4),
    "norms": Kind("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "vera": layered("VeraConfig", r=2),
    "vera without bases": layered("VeraConfig", r=2, save_projection=False),
    "pvera": layered("PveraConfig", r=2),
    "randlora": layered("RandLoraConfig", r=2),
    "randlora without bases": layered("RandLoraConfig", r=2, save_projection=False),
    "vblora": layered("VBLoRAConfig", r=2, num_vectors=5, vector_length=4, topk=2),
    "vblora in short": layered(
        "VBLoRAConfig", r=2, num_vectors=5, vector_length=4, topk=2, save_only_topk_weights=True
    ),
    "fourierft": layered("FourierFTConfig", n_frequency=5),
    "hra": layered("HRAConfig", r=2),
    "miss": layered("MissConfig", r=2),
    "bat": layered("MissConfig", r=4, init_weights="bat"),
    "trainable tokens": Kind("TrainableTokensConfig", {"token_indices": [1, 2]}),
    "shira": layered("ShiraConfig", r=2),
    "c3a": layered("C3AConfig", block_size=4),
    "road": layered("RoadConfig", group_size=4),
    "waveft": layered("WaveFTConfig", n_frequency=5),
    "delora": layered("DeloraConfig", r=2),
    "gralora": layered("GraloraConfig", r=4),
    "osf": layered("OSFConfig", effective_rank=2),
    "psoft": layered("PsoftConfig", r=2),
    "lily": layered("LilyConfig", r=2),
    "frod": layered("FrodConfig"),
    "adamss": layered("AdamssConfig", r=2),
    "glora": layered("GloraConfig", r=2),
    "tinylora": layered("TinyLoraConfig", r=2),
    "unilora": layered("UniLoraConfig", r=2),
    "prompt tuning": Kind("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prefix tuning": Kind("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": Kind("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 4}),
    "cartridge": Kind("CartridgeConfig", {"num_virtual_tokens": 3, "num_frozen_tokens": 1}),
    "adaption prompt": Kind("AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 1}),
    "cpt": Kind("CPTConfig", {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]}),
}
NOT_SEEN = {("alora", "transformers")}
"""All numbers are there, and the forward pass does not use them: only the rule knows."""


def test_the_types_that_transformers_refuses_are_those_of_the_installed_peft() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    tuners = PEFT_TYPE_TO_TUNER_MAPPING.items()
    shared = {kind.value for kind, tuner in tuners if getattr(tuner, "uses_shared_state", False)}
    assert shared == set(SHARED_STATE)
    without = set()
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        bare = config.__new__(config)
        bare.peft_type = kind
        if bare.is_prompt_learning or bare.is_adaption_prompt or config.__name__ == "ShadowConfig":
            without.add(kind.value)
    assert without == set(NO_LAYERS)
    assert set(OTHER_PEFT_TYPES) >= {*SHARED_STATE, *NO_LAYERS}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with weights and biases."""
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_the_rule_the_count_and_the_logits_agree(model_folder: Path, tmp_path: Path, name: str) -> None:
    kind, folder = KINDS[name], tmp_path / "adapter"
    llama = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    config = getattr(peft, kind.config)(**{"task_type": "CAUSAL_LM"} | kind.given)
    model = peft.get_peft_model(llama.from_pretrained(model_folder), config)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            torch.nn.init.normal_(parameter)
    wanted = logits(model)
    model.save_pretrained(folder)
    renamed = {kind.rename(key): value for key, value in load_file(folder / WEIGHTS_NAME).items()}
    save_file(renamed, folder / WEIGHTS_NAME)
    manifest = intake.inspect(folder)
    shapes = {key: tuple(value.shape) for key, value in renamed.items()}
    for engine in ENGINES:
        told = loads(findings(manifest, engine))
        torch.manual_seed(99)
        real = llama.from_pretrained(model_folder)
        try:
            if engine == "peft":
                real = peft.PeftModel.from_pretrained(real, str(folder))
            else:
                real.load_adapter(str(folder))
            same = torch.allclose(logits(real), wanted, atol=1e-4)
        except ValueError:
            same = False
        assert told == same, (engine, findings(manifest, engine))
        if why_not_counted(manifest) is None and (name, engine) not in NOT_SEEN:
            hollow = hollow_models.model_of(BaseFiles("tiny", str(model_folder)), None, shapes)
            assert (verdict(engine, hollow, folder) == "loads") == told, engine


def verdict(engine: Any, hollow: hollow_models.HollowModel, folder: Path) -> str:
    loaded = stock_loading.load(engine, hollow, folder)
    if loaded.refusal is not None:
        return "refuses"
    weights = folder / WEIGHTS_NAME
    found = loaded_numbers.count(folder, weights, loaded.components, hollow.placeholders, stock_loading.ADAPTER)
    return found.verdict


def manifest_of(understood: AdapterLayout) -> AdapterManifest:
    found = planned(
        understood.modules,
        understood.document,
        rank=max((module.rank for module in understood.modules), default=0),
        method=understood.config.method,
        refusal="; ".join(understood.refusals) or None,
    )
    name = understood.format if understood.reading is None else understood.reading.format
    return replace(found, format=name, report=replace(found.report, facts=understood.facts))


OF_THEIR_BASE = {
    "malformed/var-wrong-base-shapes": "fits itself",
    "peft/qwen2-vl-old-names": "transformers 4.52 gave the modules of its base other names",
    "peft/llama2-7b-embedding-lora-saved-layers": "a copy of the base's embeddings goes over the base's",
}
"""Layouts that PEFT refused or loaded in part on their base, of which the adapter alone tells nothing."""


@pytest.mark.slow
def test_the_rules_of_peft_say_what_was_measured_on_the_bases_of_the_corpus() -> None:
    compared, other = 0, {}
    for name, layout in layouts().items():
        measured = layout["expected"].get("peft", {}).get("verdict")
        if measured is None:
            continue
        try:
            manifest = manifest_of(read(layout))
        except RankwiseError:
            continue
        compared += 1
        if loads(findings(manifest, "peft")) != (measured == "accepts"):
            other[name] = measured
    assert compared >= 45
    assert other.keys() == OF_THEIR_BASE.keys(), other


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_layouts_of_the_corpus_load_as_the_rules_say(tmp_path: Path) -> None:
    """Layers of small sizes at the places that each layout names."""
    compared, refused = 0, 0
    for number, (name, layout) in enumerate(layouts().items()):
        document = document_of(layout)
        try:
            understood = read(layout)
        except RankwiseError:
            continue
        manifest = manifest_of(understood)
        known = document is not None and manifest.format in PEFT_FORMATS and document.get("peft_type") == "LORA"
        if not known or not manifest.modules or understood.refusals or document.get("target_modules") == "all-linear":
            continue
        folder = tmp_path / str(number)
        tensors = small(layout, understood)
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_text(json.dumps(document))
        described = intake.inspect(folder)
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        for engine in ENGINES:
            hollow = hollow_models.skeleton_of(described.modules, shapes)
            if engine == "transformers":
                hollow.target = pretrained(hollow.target)
                hollow.components = {"": hollow.target}
            told, found = loads(findings(described, engine)), verdict(engine, hollow, folder)
            assert told == (found == "loads"), (name, engine, found, findings(described, engine))
            compared += 1
            refused += not told
    assert compared >= 30
    assert refused >= 5


def small(layout: Any, understood: AdapterLayout) -> dict[str, torch.Tensor]:
    """Tensors with the layout's names and ranks, and small sides."""
    ranks = {module.rank for module in understood.modules}
    shapes = {key: tuple(shape) for key, (_, shape) in layout["tensors"].items()}
    sides = sorted({side for shape in shapes.values() for side in shape if side > 16 and side not in ranks})
    sizes = {side: 6 + 2 * position for position, side in enumerate(sides)}
    torch.manual_seed(0)
    return {key: torch.randn([sizes.get(side, side) for side in shape]) for key, shape in shapes.items()}


def pretrained(root: torch.nn.Module) -> Any:
    """A model of transformers with these children."""

    class Bare(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

    model = Bare(transformers.PretrainedConfig())
    for name, child in root.named_children():
        model.add_module(name, child)
    return model
