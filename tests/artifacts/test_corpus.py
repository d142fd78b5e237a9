"""Layouts of real adapter files: names, shapes, dtypes and configurations without weights, with the expected verdict.

`corpus/layouts.json.gz` maps a name to `tensors` {key: [dtype, shape]}, `metadata`, `files`, further names in
`directory`, and `expected`. Large dimensions are cut before a file is written; ranks are below the cut.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import ArchiveRefused, ConfigRefused, FormatUnknown
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.layout import WEIGHTS_NAME
from artifacts.manifest import AdapterManifest

LAYOUTS: dict[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "corpus/layouts.json.gz").read_bytes()))
LARGEST = 80

REFUSED = {
    "peft/peft-keys-without-config": (ConfigRefused, "adapter_config.json is missing"),
    "legacy/mistral-finetune-native": (ConfigRefused, "adapter_config.json is missing"),
    "malformed/mal-mixed-peft-and-kohya": (FormatUnknown, "a diffusers LoRA and a kohya sd-scripts LoRA in one file"),
    "malformed/mal-ddp-compile-prefix": (FormatUnknown, "a diffusers LoRA"),
    "malformed/mal-alpha-1d": (FormatUnknown, "a kohya sd-scripts LoRA"),
    "malformed/mal-missing-up": (FormatUnknown, "a kohya sd-scripts LoRA"),
    "malformed/mal-unknown-block": (FormatUnknown, "a kohya sd-scripts LoRA"),
    "malformed/mal-wrong-base-shape": (FormatUnknown, "a kohya sd-scripts LoRA"),
    "lycoris/sd15-lycoris-loha": (FormatUnknown, "a LyCORIS LoHa file"),
    "lycoris/sd15-lycoris-lokr-factored": (FormatUnknown, "a LyCORIS LoKr file"),
    "xlabs/flux-xlabs-full": (FormatUnknown, "an XLabs FLUX LoRA"),
    "ai-toolkit/wan21-14b-aitoolkit": (FormatUnknown, "a ComfyUI or ai-toolkit LoRA"),
    "onetrainer/sd3-onetrainer-legacy": (FormatUnknown, "a OneTrainer LoRA"),
    "negatives/neg-ip-adapter": (FormatUnknown, "an IP-Adapter"),
    "negatives/neg-only-alpha": (FormatUnknown, "a file of alphas without factors"),
    "negatives/neg-textual-inversion-sdxl": (FormatUnknown, "a textual-inversion embedding"),
    "checkpoint-dir/ckpt-two-adapters-subfolders": (ArchiveRefused, "Several adapters"),
}
MERGEABLE_WITH_A_WARNING = {"peft/llama2-7b-embedding-lora-saved-layers"}
MERGEABLE_FROM_BLOCKS = {"peft-other/miss-llama-small"}  # no factors in the file, but exactly a LoRA
MERGEABLE_WITH_BIASES = {"peft/llama3-8b-lora-bias"}
OTHER_BASE = {"malformed/var-wrong-base-shapes"}  # fits itself; only its base says that it is the wrong one


@pytest.fixture
def take_in(tmp_path: Path, write_tensors: Callable[..., Path]) -> Callable[[str], AdapterManifest]:
    def run(name: str) -> AdapterManifest:
        layout = LAYOUTS[name]
        tensors = {
            key: (dtype, [min(size, LARGEST) for size in shape]) for key, (dtype, shape) in layout["tensors"].items()
        }
        upload = []
        subfolders = [item for item in layout["directory"] if item.endswith(WEIGHTS_NAME)]
        places = [WEIGHTS_NAME] if name != "checkpoint-dir/ckpt-two-adapters-subfolders" else subfolders
        for number, place in enumerate(places):
            upload.append((place, write_tensors(tmp_path / f"weights-{number}", tensors, layout["metadata"])))
        for number, (place, document) in enumerate(layout["files"].items()):
            path = tmp_path / f"file-{number}"
            path.write_text(document if isinstance(document, str) else json.dumps(document))
            upload.append((place, path))
        for number, place in enumerate(layout["directory"]):
            if place not in places:
                path = tmp_path / f"other-{number}"
                path.write_bytes(b"other content")
                upload.append((place, path))
        return inspect(receive(upload, tmp_path / "work", IntakeLimits()))

    return run


@pytest.mark.parametrize("name", sorted(LAYOUTS.keys() - REFUSED.keys()))
def test_accepted_as_expected(take_in: Callable[[str], AdapterManifest], name: str) -> None:
    layout = LAYOUTS[name]
    expected = layout["expected"]
    manifest = take_in(name)
    report = manifest.report
    assert report.used_keys + len(report.ignored) == len(layout["tensors"])
    if manifest.modules and name not in MERGEABLE_FROM_BLOCKS:
        ignored = {entry.key.rpartition(".")[0] for entry in report.ignored}
        assert len(manifest.modules) + len(ignored) == expected["n_modules"]
        ranks = Counter(str(module.rank) for module in manifest.modules)
        listed = expected["ranks_in_file"]  # the twelve most frequent ones
        assert ranks.keys() <= listed.keys() or len(listed) == 12
        assert all(ranks[rank] == count for rank, count in listed.items() if rank in ranks)
    if isinstance(expected["rank"], int):
        assert manifest.rank == expected["rank"]
    if isinstance(expected["alpha"], int | float):
        assert manifest.alpha == expected["alpha"]
    if name not in OTHER_BASE:
        exceptions = MERGEABLE_WITH_A_WARNING | MERGEABLE_WITH_BIASES | MERGEABLE_FROM_BLOCKS
        exact = expected["mergeable_as_lora"] is True or name in exceptions
        assert manifest.mergeable == exact
    assert manifest.mergeable == (manifest.refusal is None)
    assert {module.bias_key is not None for module in manifest.modules} <= {name in MERGEABLE_WITH_BIASES}
    if name in MERGEABLE_WITH_A_WARNING:
        assert "copy of a base weight" in report.warnings[0]
    assert {entry.key for entry in report.dropped_files} <= set(layout["directory"])


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(take_in: Callable[[str], AdapterManifest], name: str) -> None:
    kind, words = REFUSED[name]
    with pytest.raises(kind) as caught:
        take_in(name)
    assert words in caught.value.detail


def test_patterns_of_a_real_adapter_reach_its_modules(take_in: Callable[[str], AdapterManifest]) -> None:
    modules = {module.path: module for module in take_in("peft/llama3-8b-rank-alpha-pattern").modules}
    first, key, other = (
        modules[f"model.layers.{layer}.self_attn.{name}"]
        for layer, name in ((0, "q_proj"), (3, "k_proj"), (3, "q_proj"))
    )
    assert [(module.rank, module.scaling) for module in (first, key, other)] == [(64, 1.0), (4, 0.5), (16, 2.0)]


def test_components_of_a_diffusers_file_have_their_own_scaling(take_in: Callable[[str], AdapterManifest]) -> None:
    manifest = take_in("diffusers/flux-diffusers-te-metadata")
    scalings = {module.path.partition(".")[0]: module.scaling for module in manifest.modules}
    assert scalings == {"text_encoder": 1.0, "transformer": 2.0}
