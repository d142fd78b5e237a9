from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import ConfigRefused, FileBroken, FormatUnknown, PickleRefused, RankwiseError
from artifacts.layout import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME, parse_json, read_layout

Make = Callable[..., Any]


def test_directory(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("model.q_proj"))
    layout = read_layout(directory)
    assert (layout.format, layout.weights_path, layout.config_path) == (
        "peft",
        directory / WEIGHTS_NAME,
        directory / CONFIG_NAME,
    )
    assert [module.path for module in layout.modules] == ["model.q_proj"]
    assert (layout.config.rank, layout.refusals) == (4, ())


def test_single_file_with_our_metadata(tmp_path: Path, write_tensors: Make, pairs: Make, lora_config: Make) -> None:
    path = tmp_path / "merged.safetensors"
    write_tensors(path, pairs("model.q_proj"), {METADATA_KEY: json.dumps(lora_config())})
    layout = read_layout(path)
    assert (layout.format, layout.config_path, layout.config.base_model) == (
        "safetensors-metadata",
        None,
        "someone/base",
    )


def test_single_file_with_components(tmp_path: Path, write_tensors: Make, pairs: Make) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q"], "rank_pattern": {"mid.to_q": 2}}
    metadata = {f"unet.{name}": value for name, value in fields.items()}
    metadata |= {"text_encoder.r": 2, "text_encoder.lora_alpha": 1, "text_encoder.target_modules": ["q_proj"]}
    tensors = pairs("unet.down.to_q", prefix="") | pairs("unet.mid.to_q", rank=2, prefix="")
    tensors |= pairs("text_encoder.q_proj", rank=2, prefix="")
    tensors["vae.weight"] = ("F32", [2])
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(metadata)})
    layout = read_layout(path)
    assert [(module.path, module.rank, module.scaling) for module in layout.modules] == [
        ("text_encoder.q_proj", 2, 0.5),
        ("unet.down.to_q", 4, 2.0),
        ("unet.mid.to_q", 2, 4.0),
    ]
    assert [entry.key for entry in layout.match.ignored] == ["vae.weight"]
    assert "none of the components" in layout.match.warnings[-1]
    assert not layout.refusals


def test_factors_of_a_component_that_the_metadata_passes_over_keep_the_rest_from_being_merged(
    tmp_path: Path, write_tensors: Make, pairs: Make
) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    metadata = {METADATA_KEY: json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]})}
    write_tensors(path, pairs("unet.down.to_q", "text_encoder.q_proj", prefix=""), metadata)
    layout = read_layout(path)
    assert [module.path for module in layout.modules] == ["unet.down.to_q"]
    assert "2 factors, for instance 'text_encoder.q_proj.lora_A.weight'" in layout.refusals[0]


@pytest.mark.parametrize("text", ["{}", "[]", '{"r"', '{"plain": 1}', '{".r": 1}', '{"unet.r": 0}'])
def test_metadata_that_is_no_configuration(tmp_path: Path, write_tensors: Make, pairs: Make, text: str) -> None:
    path = write_tensors(tmp_path / "x.safetensors", pairs("unet.to_q", prefix=""), {METADATA_KEY: text})
    with pytest.raises(ConfigRefused):
        read_layout(path)


def test_missing_adapter_config(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("model.q_proj"))
    (directory / CONFIG_NAME).unlink()
    with pytest.raises(ConfigRefused, match=r"adapter_config\.json is missing"):
        read_layout(directory)


def test_missing_weights(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("model.q_proj"))
    (directory / WEIGHTS_NAME).unlink()
    with pytest.raises(FormatUnknown, match=r"no adapter_model\.safetensors"):
        read_layout(directory)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PickleRefused, match=r"adapter_model\.bin"):
        read_layout(directory)


def test_weights_of_another_name(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("model.q_proj"))
    (directory / WEIGHTS_NAME).rename(directory / "mine.safetensors")
    assert read_layout(directory).weights_path.name == "mine.safetensors"
    (directory / "other.safetensors").write_bytes(b"")
    with pytest.raises(FormatUnknown, match="Several safetensors files"):
        read_layout(directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"r": NaN}',
        '{"r": 1, "r": 2}',
        '{"x": {"a": 1, "a": 2}}',
        '{"x": 1e999}',
        '{"x": 99999999999999999999}',
        '{"x": "a\\u0000b"}',
        '{"\\ud800": 1}',
        '{"x": ' + "[" * 40 + "]" * 40 + "}",
        "[" * 100_000,
    ],
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ConfigRefused, match=r"x\.json"):
        parse_json(text, "x.json")


def test_config_that_is_no_text_or_too_long(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("model.q_proj"))
    for content in (b"\xff\xfe{}", b" " * (4 * 1024 * 1024 + 1)):
        (directory / CONFIG_NAME).write_bytes(content)
        with pytest.raises(ConfigRefused):
            read_layout(directory)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "x" * 501, "\ud800"])
def test_tensor_names_that_no_database_would_take(peft_directory: Make, pairs: Make, name: str) -> None:
    with pytest.raises(FileBroken, match="tensor name"):
        read_layout(peft_directory({**pairs("model.q_proj"), name: ("F32", [1])}))


def test_other_types_are_stored_without_description(peft_directory: Make) -> None:
    layout = read_layout(peft_directory({"base_model.model.x.hada_w1_a": ("F32", [4, 8])}, peft_type="LOHA"))
    assert (layout.modules, layout.match.used, layout.config.method) == ((), ("base_model.model.x.hada_w1_a",), "loha")


def test_other_types_without_tensors(peft_directory: Make) -> None:
    with pytest.raises(RankwiseError, match="no tensors"):
        read_layout(peft_directory({}, peft_type="LOHA"))


@pytest.mark.parametrize("start", ["text_encoders.qwen25_7b.transformer.", "te.", "te1."])
def test_text_encoders_under_names_that_are_not_read_are_called_so(
    tmp_path: Path, write_tensors: Callable[..., Path], pairs: Callable[..., Any], start: str
) -> None:
    path = write_tensors(
        tmp_path / "te.safetensors", pairs("model.layers.0.self_attn.q_proj", prefix=start, d_in=64, d_out=64)
    )
    with pytest.raises(FormatUnknown) as caught:
        read_layout(path)
    assert "a LoRA of a text encoder under a name that is not read" in caught.value.detail
    assert f"'{start}model.layers.0.self_attn.q_proj.lora_A.weight'" in caught.value.detail
    assert "clip_l, clip_g, clip_h and t5xxl" in str(caught.value.hint)


def test_more_components_than_a_pipeline_has(tmp_path: Path, write_tensors: Make, pairs: Make) -> None:
    document = {f"part{number}.r": 4 for number in range(17)}
    path = write_tensors(
        tmp_path / "x.safetensors", pairs("part0.to_q", prefix=""), {METADATA_KEY: json.dumps(document)}
    )
    with pytest.raises(ConfigRefused, match="names 17 components; a pipeline has at most 16"):
        read_layout(path)


def test_a_component_that_is_configured_and_not_there(tmp_path: Path, write_tensors: Make, pairs: Make) -> None:
    document = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.target_modules": ["to_q"]}
    tensors = pairs("blocks.0.to_q", prefix="diffusion_model.")
    path = write_tensors(tmp_path / "x.safetensors", tensors, {METADATA_KEY: json.dumps(document)})
    with pytest.raises(FormatUnknown, match="'transformer', of which there is no tensor"):
        read_layout(path)
