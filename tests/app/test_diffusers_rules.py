"""The rule for diffusers, and what diffusers makes of the file that it names, on a pipeline without weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from artifacts.layout import CONFIG_NAME
from scripts.formats_report import CorpusValues, document_of, header_of, layouts

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CHOSEN = re.compile(r"mid_block|down_blocks.0.attentions.0|layers.0.self")
"""A few modules of each part are enough: the names of the others differ in numbers only."""
LAYOUTS = sorted(name for name in layouts() if "/sd15-" in name)
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations alone."""
    import diffusers
    import transformers

    folder = tmp_path_factory.mktemp("sd15")
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    with torch.device("meta"):
        diffusers.UNet2DConditionModel(cross_attention_dim=768).save_config(folder / "unet")
    config = transformers.CLIPTextConfig(**text, num_hidden_layers=12, architectures=["CLIPTextModel"])
    config.save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def compare(serve: Any, pipeline_folder: Path, tmp_path: Path) -> Callable[..., tuple[bool, str]]:
    """(what the rule says, what came of loading the file that it names); of a refused one, the stored file."""
    from workers.engines import hollow_models, loaded_numbers, stock_loading

    server = serve(pool="off")

    def do(tensors: Mapping[str, torch.Tensor], metadata: Any = None, document: Any = None) -> tuple[bool, str]:
        content = save({key: value.contiguous() for key, value in tensors.items()}, metadata)
        name = "x.safetensors" if document is None else "adapter_model.safetensors"
        parts = [("file", (name, content))]
        if document is not None:
            parts.append(("file", (CONFIG_NAME, json.dumps(document).encode())))
        answer = server.upload(parts)
        assert answer.status_code == 201, answer.text
        path = f"/adapters/{answer.json()['id']}"
        told = server.client.get(f"{path}/compatibility", params={"engine": "diffusers"}).json()
        rules = {item["rule"] for item in told["findings"]}
        file = tmp_path / "given.safetensors"
        file.write_bytes(content)
        if told["loads"]:
            assert rules <= {"diffusers-format"}
            layout = "diffusers" if rules else "safetensors"
            given = server.client.get(f"{path}/download", params={"format": layout})
            assert given.status_code == 200, given.text
            file.write_bytes(given.content)
        hollow = hollow_models.pipeline_of(pipeline_folder, "sd15")
        loaded = stock_loading.load("diffusers", hollow, file)
        if loaded.refusal is not None:
            return told["loads"], f"refuses: {loaded.refusal['message']}"
        found = loaded_numbers.count(file, file, loaded.components, hollow.placeholders, stock_loading.ADAPTER)
        return told["loads"], found.verdict

    return do


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_corpus(compare: Any, name: str) -> None:
    layout = layouts()[name]
    header, values = header_of(layout), CorpusValues(layout)
    torch.manual_seed(0)
    tensors = {}
    for key, info in header.tensors.items():
        if CHOSEN.search(key):
            scalar = key.endswith(".alpha")
            tensors[key] = torch.tensor(values.scalar(info)) if scalar else torch.randn(info.shape) * 0.05
    assert len(tensors) >= 8
    told, found = compare(tensors, layout.get("metadata"), document_of(layout))
    assert told == (found == "loads"), found


@pytest.mark.parametrize(
    ("stem", "names", "more"),
    [
        (LAYER, ("lora_A", "lora_B"), None),
        (LAYER, ("lora_A", "lora_B"), "lora_magnitude_vector"),
        (LAYER, ("lora_A", "lora_B"), "lora_magnitude_vector.weight"),
        (LAYER, ("lora_A", "lora_B"), "dora_scale"),
        (LAYER, ("lora.down", "lora.up"), None),
        (LAYER, ("lora_down", "lora_up"), None),
        (LAYER, ("lora_A.default", "lora_B.default"), None),
        (f"module.{LAYER}", ("lora_A", "lora_B"), None),
        (LAYER.replace("unet.", "unet._orig_mod."), ("lora_A", "lora_B"), None),
    ],
)
def test_names_of_diffusers_and_such_as_are_near(compare: Any, stem: str, names: Any, more: str | None) -> None:
    down, up = names
    torch.manual_seed(0)
    tensors = {f"{stem}.{down}.weight": torch.randn(2, 1280), f"{stem}.{up}.weight": torch.randn(1280, 2)}
    if more is not None:
        tensors[f"{stem}.{more}"] = torch.rand(1280) + 0.5
    told, found = compare(tensors)
    assert told == (found == "loads"), found


def test_a_text_encoder_of_several_ranks(compare: Any) -> None:
    torch.manual_seed(0)
    tensors = {}
    for number, (layer, rank) in enumerate({"q_proj": 4, "k_proj": 4, "out_proj": 2}.items()):
        stem = f"lora_te_text_model_encoder_layers_{9 + number}_self_attn_{layer}"
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, 768)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(768, rank)
        tensors[f"{stem}.alpha"] = torch.tensor(3.0)
    assert compare(tensors) == (True, "loads")


@pytest.mark.parametrize("described", [False, True])
@pytest.mark.parametrize("end", ["", ".weight"])
def test_a_decomposed_adapter(compare: Any, end: str, described: bool) -> None:
    """Of a UNet it is applied; of a text encoder transformers leaves the magnitudes out, if they end as PEFT's do."""
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "use_dora": True}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})}
    torch.manual_seed(0)
    tensors = {f"{LAYER}.lora_A.weight": torch.randn(2, 1280), f"{LAYER}.lora_B.weight": torch.randn(1280, 2)}
    tensors[f"{LAYER}.lora_magnitude_vector{end}"] = torch.rand(1280) + 0.5
    assert compare(tensors, metadata if described else None) == (True, "loads")
    if not described:
        stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
        tensors |= {f"{stem}.lora_A.weight": torch.randn(2, 768), f"{stem}.lora_B.weight": torch.randn(768, 2)}
        tensors[f"{stem}.lora_magnitude_vector{end}"] = torch.rand(768) + 0.5
        assert compare(tensors)[0] is False
