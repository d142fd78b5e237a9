"""Layouts of real adapter files: names, shapes, dtypes and configurations without weights, with the expected verdict.

`corpus/layouts.json.xz` maps a name to `tensors` {key: [dtype, shape]}, `values` of scalars, `metadata`, `files`,
further names in `directory`, and `expected`. Headers are read as they are; where files are needed, large sizes are cut.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import ArchiveRefused, ConfigRefused, FileBroken, FormatUnknown, PickleRefused
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.layout import WEIGHTS_NAME
from artifacts.manifest import AdapterManifest
from scripts.formats_report import classify, layouts, read

LAYOUTS = layouts()
LARGEST = 80

REFUSED = {
    "gguf/gguf-alora-invocation": (FormatUnknown, "activated LoRA"),
    "gguf/gguf-mixtral-experts-embd": (FormatUnknown, "_exps' the first, are none of llama"),
    "legacy/litgpt-lora": (PickleRefused, "pickle"),
    "legacy/torchtune-native-adapter": (PickleRefused, "pickle"),
    "legacy/mistral-finetune-native": (ConfigRefused, "params.json is missing: it looks like a LoRA with Mistral"),
    "peft/peft-keys-without-config": (ConfigRefused, "adapter_config.json is missing"),
    "malformed/mal-missing-up": (FileBroken, "attn1_to_k: the up (B) matrix is missing"),
    "malformed/mal-mixed-peft-and-kohya": (FormatUnknown, "a diffusers LoRA and a kohya sd-scripts LoRA in one file"),
    "malformed/mal-wrong-base-shape": (FileBroken, "ΔW is 320×768, the module of Stable Diffusion 1.x is 320×320"),
    "negatives/neg-full-unet-checkpoint": (FormatUnknown, "the weights of a whole model"),
    "negatives/neg-ip-adapter": (FormatUnknown, "an IP-Adapter"),
    "negatives/neg-only-alpha": (FormatUnknown, "a file of alphas without factors"),
    "negatives/neg-textual-inversion-sdxl": (FormatUnknown, "a textual-inversion embedding"),
    "negatives/neg-vae": (FormatUnknown, "a VAE"),
}
NO_FILE_OF_ITS_OWN = {"checkpoint-dir/ckpt-two-adapters-subfolders"}
MERGEABLE_NONETHELESS = {
    "peft/llama2-7b-embedding-lora-saved-layers": "partial",  # a copy of a base weight, of which the answer warns
    "peft/llama3-8b-lora-bias": "partial",  # biases of lora_B, which some methods sum
    "peft-other/miss-llama-small": False,  # no factors in the file, but exactly a LoRA
    "malformed/var-wrong-base-shapes": False,  # fits itself; only its base says that it is the wrong one
    "vllm/vllm-new_embeddings-file": "partial",  # another file of the directory says so
    "lycoris/sd15-lycoris-locon-tucker": "after collapse",  # the core goes into A
    "peft-other/adalora-llama-small": "after conversion",
}
NOT_MERGEABLE = {
    "kohya/qwen-kohya-invoke",  # LoKr, whatever its list says
    "peft-other/adalora-llama-small",
    "peft-other/vera-llama-small",
}


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - REFUSED.keys() - NO_FILE_OF_ITS_OWN))
def test_every_layout_is_understood_as_expected(name: str) -> None:
    layout = LAYOUTS[name]
    expected = layout["expected"]
    row = classify(name, layout)
    assert row.layout is not None, row.reason
    assert row.outcome != "silent", row.reason
    found = row.layout
    assert [verdict.key for verdict in found.verdicts] == list(layout["tensors"])
    mergeable = not found.refusals
    allowed = expected["mergeable_as_lora"] is True or name in MERGEABLE_NONETHELESS
    assert mergeable == (allowed and name not in NOT_MERGEABLE)
    reading = found.reading
    if reading is None:
        return
    engine = expected.get("diffusers", {})
    if engine.get("verdict") == "accepts" and found.modules and not reading.typed:
        assert len(found.modules) >= engine["n_modules_out"] - 190 * name.startswith("bfl/")


@pytest.mark.parametrize("name", ["kohya/sd15-kohya-r32", "peft/gpt2-conv1d-fan_in_fan_out"])
@pytest.mark.parametrize(
    "expectation",
    [{"n_modules": 7}, {"ranks_in_file": {"32": 263}}, {"alpha": 15.5}, {"mergeable_as_lora": False}],
    ids=str,
)
def test_another_result_than_expected_is_not_passed_over(expectation: dict[str, Any], name: str) -> None:
    layout = LAYOUTS[name]
    assert classify(name, layout).outcome == "accepted"
    changed = layout | {"expected": layout["expected"] | expectation}
    assert classify(name, changed).outcome == "silent"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str) -> None:
    kind, words = REFUSED[name]
    with pytest.raises(kind) as caught:
        read(LAYOUTS[name])
    assert words in caught.value.detail


@pytest.fixture
def take_in(tmp_path: Path, write_tensors: Callable[..., Path]) -> Callable[[str], AdapterManifest]:
    """A layout as real files, on the whole way in."""

    def run(name: str) -> AdapterManifest:
        layout = LAYOUTS[name]
        tensors = {
            key: (dtype, [min(size, LARGEST) for size in shape]) for key, (dtype, shape) in layout["tensors"].items()
        }
        upload = []
        directory = layout.get("directory", [])
        places = [layout.get("weights_file") or WEIGHTS_NAME]
        if name == "checkpoint-dir/ckpt-two-adapters-subfolders":
            places = [item for item in directory if item.endswith(WEIGHTS_NAME)]
        for number, place in enumerate(places):
            path = write_tensors(tmp_path / f"weights-{number}", tensors, layout.get("metadata"))
            upload.append((place, path))
        for number, (place, document) in enumerate(layout.get("files", {}).items()):
            path = tmp_path / f"file-{number}"
            path.write_text(document if isinstance(document, str) else json.dumps(document))
            upload.append((place, path))
        for number, place in enumerate(directory):
            if place not in places:
                path = tmp_path / f"other-{number}"
                path.write_bytes(b"other content")
                upload.append((place, path))
        return inspect(receive(upload, tmp_path / "work", IntakeLimits()))

    return run


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-dir/ckpt-hf-trainer-peft",
        "checkpoint-dir/ckpt-hf-trainer-output-with-many",
        "checkpoint-dir/ckpt-fsdp-distcp",
        "peft/gpt2-conv1d-fan_in_fan_out",
        "peft/resnet50-conv-lora",
        "vllm/vllm-new_embeddings-file",
    ],
)
def test_directories_keep_their_adapter_and_name_the_rest(take_in: Callable[[str], AdapterManifest], name: str) -> None:
    layout = LAYOUTS[name]
    manifest = take_in(name)
    report = manifest.report
    assert report.used_keys + len(report.ignored) == len(layout["tensors"]) == len(manifest.keys)
    assert {entry.key for entry in report.dropped_files} <= set(layout.get("directory", []))
    kept = {entry.path for entry in manifest.files}
    assert kept >= {item for item in layout["expected"].get("keep", []) if "/" not in item}


def test_several_adapters_in_one_upload_are_refused(take_in: Callable[[str], AdapterManifest]) -> None:
    with pytest.raises(ArchiveRefused, match="Several adapters"):
        take_in("checkpoint-dir/ckpt-two-adapters-subfolders")


def test_patterns_of_a_real_adapter_reach_its_modules() -> None:
    modules = {module.path: module for module in read(LAYOUTS["peft/llama3-8b-rank-alpha-pattern"]).modules}
    first, key, other = (
        modules[f"model.layers.{layer}.self_attn.{name}"]
        for layer, name in ((0, "q_proj"), (3, "k_proj"), (3, "q_proj"))
    )
    assert [(module.rank, module.scaling) for module in (first, key, other)] == [(64, 1.0), (4, 0.5), (16, 2.0)]


def test_components_of_a_diffusers_file_have_their_own_scaling() -> None:
    found: Any = read(LAYOUTS["diffusers/flux-diffusers-te-metadata"])
    scalings = {module.path.partition(".")[0]: module.scaling for module in found.modules}
    assert scalings == {"text_encoder": 1.0, "transformer": 2.0}
