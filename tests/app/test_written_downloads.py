"""Adapters handed out in other formats, dtypes and ranks: whatever is written, the reader finds the same ΔW in it."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load, save

from artifacts.adapter import Adapter

Deltas = dict[str, NDArray[np.float64]]

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
SD1 = {
    f"{UNET}_attn1_to_q": (4, 32, 32),
    f"{UNET}_ff_net_0_proj": (8, 256, 32),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (4, 96, 24),
}
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (4, 96, 32),
    "lora_unet_double_blocks_0_img_mlp_0": (2, 128, 32),
    "lora_unet_single_blocks_0_linear1": (4, 224, 32),
    "lora_unet_final_layer_adaLN_modulation_1": (4, 64, 32),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (4, 24, 24),
}
SDXL = {
    "lora_unet_input_blocks_4_1_proj_in": (4, 64, 64),
    "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k": (4, 128, 192),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (4, 96, 24),
    "lora_te2_text_model_encoder_layers_31_mlp_fc1": (4, 160, 40),
}
QWEN = {
    "lora_unet_transformer_blocks_0_attn_to_q": (4, 32, 32),
    "lora_unet_transformer_blocks_0_img_mod_1": (4, 192, 32),
}
FILES = {"sd1": SD1, "flux": FLUX, "sdxl": SDXL, "qwen": QWEN}


def file_of(sizes: Mapping[str, Sequence[int]], alpha: float | None = None) -> bytes:
    """A kohya file; unless it is given, alpha differs from module to module, and is no power of two."""
    random = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for position, (stem, (rank, d_out, d_in)) in enumerate(sizes.items()):
        tensors[f"{stem}.lora_down.weight"] = random.standard_normal((rank, d_in)).astype(np.float32)
        tensors[f"{stem}.lora_up.weight"] = random.standard_normal((d_out, rank)).astype(np.float32)
        tensors[f"{stem}.alpha"] = np.array(alpha or 3.0 + position, np.float32)
    return save(tensors)


def deltas(content: bytes, folder: Path) -> Deltas:
    """Path → ΔW of a file or a zip, as the service reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "x.safetensors"
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None
            archive.extractall(folder)
        path = folder
    else:
        path.write_bytes(content)
    adapter = Adapter.open(path)
    found = {}
    for name, module in adapter.items():
        product = module.scaling * module.B.double() @ module.A.double()
        found[name] = product.numpy()
    return found


def same(first: Deltas, second: Deltas, tolerance: float) -> None:
    assert first.keys() == second.keys()
    for path, delta in first.items():
        assert np.linalg.norm(delta - second[path]) <= tolerance * np.linalg.norm(delta), path


def upload(server: Any, content: bytes, name: str = "x.safetensors") -> tuple[str, dict[str, Any]]:
    answer = server.upload([("file", (name, content))])
    assert answer.status_code in (200, 201), answer.text
    return f"/adapters/{answer.json()['id']}/download", answer.json()


@pytest.mark.parametrize("name", FILES)
def test_every_format_says_the_same_deltas(server: Any, tmp_path: Path, name: str) -> None:
    content = file_of(FILES[name])
    expected = deltas(content, tmp_path / "stored")
    url, adapter = upload(server, content)
    for layout in ("kohya", "comfy", "diffusers"):
        answer = server.client.get(url, params={"format": layout})
        assert answer.status_code == 200, answer.text
        assert len(answer.content) == int(answer.headers["content-length"])
        same(expected, deltas(answer.content, tmp_path / layout), 1e-6)
        assert float(answer.headers["rankwise-relative-error"]) < 1e-6
        # and the service takes what it wrote
        assert upload(server, answer.content)[1]["facts"]["architecture"] == adapter["facts"]["architecture"]


def test_text_encoders_are_named_by_the_ends_that_every_release_of_transformers_has(server: Any) -> None:
    layer = "lora_te_text_model_encoder_layers_0_mlp"
    url, _ = upload(server, file_of({f"{layer}_fc1": (4, 96, 24), f"{layer}_fc2": (2, 24, 96)}))
    content = server.client.get(url, params={"format": "diffusers"}).content
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    config = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    end = "encoder.layers.0.mlp"
    assert config["text_encoder.target_modules"] == [f"{end}.fc1", f"{end}.fc2"]
    assert config["text_encoder.rank_pattern"] == {f"{end}.fc2": 2}
    assert f"text_encoder.text_model.{end}.fc1.lora_A.weight" in header


def test_what_kohya_wrote_comes_back_with_its_own_names_and_numbers(server: Any) -> None:
    for sizes in FILES.values():
        content = file_of(sizes)
        url, _ = upload(server, content)
        again, before = load(server.client.get(url, params={"format": "kohya"}).content), load(content)
        assert again.keys() == before.keys()
        for key, tensor in before.items():
            assert np.array_equal(again[key], tensor), key


def test_one_component_becomes_a_peft_directory(server: Any, tmp_path: Path) -> None:
    sizes = {name: size for name, size in FLUX.items() if "_te1_" not in name}
    content = file_of(sizes)
    url, _ = upload(server, content)
    answer = server.client.get(url)
    expected = {path.removeprefix("transformer."): delta for path, delta in deltas(content, tmp_path / "a").items()}
    same(expected, deltas(answer.content, tmp_path / "b"), 1e-6)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert "norm_out.linear" in config["target_modules"]
    refused = server.client.get(upload(server, file_of(FLUX))[0])
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "/query/format"
    assert "diffusers" in refused.json()["hint"]


def test_targets_that_other_modules_end_like_are_told_apart(server: Any, tmp_path: Path) -> None:
    sizes = {"lora_unet_final_layer_linear": (2, 8, 32), "lora_unet_double_blocks_0_img_mlp_0": (2, 128, 32)}
    url, _ = upload(server, file_of(sizes))
    deltas(server.client.get(url).content, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "proj_out" in config["target_modules"]
    assert config["exclude_modules"] == sorted(f"single_transformer_blocks.{number}.proj_out" for number in range(38))


def test_parts_of_a_fused_projection_are_filled_up_with_zeros(server: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    start = "transformer.transformer_blocks.0.attn"
    content = save(
        {
            f"{start}.{layer}.lora_{side}.weight": random.standard_normal(shape).astype(np.float32)
            for layer, rank in (("to_q", 2), ("to_v", 3))
            for side, shape in (("A", (rank, 32)), ("B", (32, rank)))
        }
    )
    url, _ = upload(server, content)
    answer = server.client.get(url, params={"format": "kohya"})
    assert load(answer.content)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (96, 5)
    found, expected = deltas(answer.content, tmp_path / "a"), deltas(content, tmp_path / "b")
    assert not found.pop(f"{start}.to_k").any()
    same(expected, found, 1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 6e-3), ("float16", 8e-4)])
def test_a_dtype_is_rounded_to_and_the_loss_is_told(server: Any, tmp_path: Path, dtype: str, bound: float) -> None:
    content = file_of(SD1)
    url, _ = upload(server, content)
    expected = deltas(content, tmp_path / "stored")
    for layout in ("kohya", "diffusers"):
        answer = server.client.get(url, params={"format": layout, "dtype": dtype})
        found = deltas(answer.content, tmp_path / layout)
        gone = math.sqrt(sum(np.linalg.norm(expected[path] - found[path]) ** 2 for path in expected))
        error = gone / math.sqrt(sum(np.linalg.norm(delta) ** 2 for delta in expected.values()))
        assert error < bound
        assert float(answer.headers["rankwise-relative-error"]) == pytest.approx(error, rel=0.02, abs=2e-8)
        head = json.loads(answer.content[8 : 8 + int.from_bytes(answer.content[:8], "little")])
        written = json.loads(head["__metadata__"]["rankwise_export"])
        assert (written["dtype"], written["format"]) == (dtype, layout)
        assert written["relative_error"] == float(answer.headers["rankwise-relative-error"])


def test_peft_adapters_keep_their_configuration_in_another_dtype(
    server: Any, adapter_files: Any, tmp_path: Path
) -> None:
    created = server.upload(adapter_files().parts()).json()
    url = f"/adapters/{created['id']}/download"
    for layout in ("peft", "safetensors"):
        answer = server.client.get(url, params={"format": layout, "dtype": "bfloat16"})
        name = "x.zip" if layout == "peft" else "x.safetensors"
        again = server.upload([("file", (name, answer.content))]).json()
        assert again["dtype"] == "BF16"
        assert again["config"] == created["config"]
        assert 0 < float(answer.headers["rankwise-relative-error"]) < 0.01
    plain = server.client.get(url, params={"dtype": "float32"})
    assert float(plain.headers["rankwise-relative-error"]) == 0
    assert deltas(plain.content, tmp_path / "a").keys()


def test_a_smaller_rank_is_the_nearest_and_its_error_is_told(server: Any, tmp_path: Path) -> None:
    content = file_of(SD1)
    url, _ = upload(server, content)
    expected = deltas(content, tmp_path / "stored")
    tail = total = 0.0
    for delta in expected.values():
        sigma = np.linalg.svd(delta, compute_uv=False)
        tail, total = tail + float((sigma[2:] ** 2).sum()), total + float((sigma**2).sum())
    for layout in ("kohya", "comfy", "diffusers"):
        answer = server.client.get(url, params={"format": layout, "rank": 2})
        found = deltas(answer.content, tmp_path / layout)
        gone = sum(np.linalg.norm(expected[path] - found[path]) ** 2 for path in expected)
        assert gone == pytest.approx(tail, rel=1e-5)
        assert float(answer.headers["rankwise-relative-error"]) == pytest.approx(math.sqrt(tail / total), rel=0.01)
        assert answer.headers["etag"].startswith("W/")
        ends = ("lora_down.weight", "lora_A.weight")
        assert {len(tensor) for key, tensor in load(answer.content).items() if key.endswith(ends)} == {2}
    too_large = server.client.get(url, params={"format": "kohya", "rank": 9})
    assert (too_large.status_code, too_large.json()["errors"][0]["pointer"]) == (422, "/query/rank")


def test_a_rank_of_a_peft_adapter(server: Any, adapter_files: Any, tmp_path: Path) -> None:
    created = server.upload(adapter_files().parts()).json()
    url = f"/adapters/{created['id']}/download"
    whole = deltas(server.client.get(url).content, tmp_path / "whole")
    answer = server.client.get(url, params={"rank": 2})
    cut = deltas(answer.content, tmp_path / "cut")
    for path, delta in whole.items():
        left, sigma, right = np.linalg.svd(delta)
        np.testing.assert_allclose(cut[path], (left[:, :2] * sigma[:2]) @ right[:2], atol=1e-5)
    assert server.upload([("file", ("x.zip", answer.content))]).json()["rank"] == 2


def test_a_rank_that_was_trained_is_cut_as_it_was_trained(server: Any, adapter_files: Any, tmp_path: Path) -> None:
    mark = {"rankwise_dylora": '{"ranks":[1,2,4],"scale_mode":"constant"}'}
    parts = [
        ("file", ("adapter_model.safetensors", adapter_files().weights(mark))),
        ("file", ("adapter_config.json", adapter_files().config_json())),
    ]
    url = f"/adapters/{server.upload(parts).json()['id']}/download"
    expected = deltas(server.client.get(url, params={"rank": 2}).content, tmp_path / "stored")
    answer = server.client.get(url, params={"rank": 2, "dtype": "float32"})
    same(expected, deltas(answer.content, tmp_path / "written"), 1e-6)
    refused = server.client.get(url, params={"rank": 3, "dtype": "float32"})
    assert refused.json()["errors"][0]["pointer"] == "/query/rank"


def test_ranges_and_tags_hold_for_what_is_computed(server: Any) -> None:
    url, _ = upload(server, file_of(FLUX))
    query = {"format": "comfy", "dtype": "bfloat16"}
    whole = server.client.get(url, params=query)
    total, etag = len(whole.content), whole.headers["etag"]
    pieces = b""
    for start in range(0, total, 7001):
        stop = min(start + 7001, total)
        part = server.client.get(url, params=query, headers={"Range": f"bytes={start}-{stop - 1}", "If-Range": etag})
        assert part.status_code == 206
        pieces += part.content
    assert pieces == whole.content
    assert server.client.get(url, params=query, headers={"If-None-Match": etag}).status_code == 304
    head = server.client.head(url, params=query)
    assert (head.headers["etag"], head.headers["content-length"]) == (etag, str(total))
    others = [query | {"dtype": "float16"}, query | {"format": "kohya"}, {"format": "comfy"}, query | {"rank": 2}]
    tags = {server.client.head(url, params=other).headers["etag"] for other in others}
    assert len(tags) == 4
    assert etag not in tags
    # a tag that does not promise equal bytes is no reason to go on with a part
    weak = server.client.head(url, params=query | {"rank": 2}).headers["etag"]
    again = server.client.get(url, params=query | {"rank": 2}, headers={"Range": "bytes=9-", "If-Range": weak})
    assert again.status_code == 200
    unchanged = server.client.get(url, params=query | {"rank": 2}, headers={"If-None-Match": weak})
    assert unchanged.status_code == 304


def test_what_a_format_can_not_hold_is_refused_by_name(server: Any, adapter_files: Any) -> None:
    language = server.upload(adapter_files().parts()).json()["id"]
    factors = {"lokr_w1": (4, 4), "lokr_w2": (8, 8)}
    lokr = {f"{UNET}_attn1_to_q.{name}": np.ones(shape, np.float32) for name, shape in factors.items()}
    _, other = upload(server, save(lokr))
    for adapter, layout, words in (
        (language, "kohya", "no model whose names are stored here"),
        (language, "comfy", "no model whose names are stored here"),
        (language, "diffusers", "no component of a pipeline"),
        (other["id"], "kohya", "lokr"),
    ):
        refused = server.client.get(f"/adapters/{adapter}/download", params={"format": layout})
        assert refused.status_code == 422
        (finding,) = refused.json()["errors"]
        assert finding["pointer"] == "/query/format"
        assert words in finding["message"]
    refused = server.client.get(upload(server, file_of(SD1))[0], params={"format": "safetensors", "dtype": "float16"})
    assert refused.json()["errors"][0]["pointer"] == "/query/format"


def test_numbers_that_a_dtype_can_not_hold_are_refused(server: Any) -> None:
    stem = f"{UNET}_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": np.full((1, 32), 1e6, np.float32)}
    tensors[f"{stem}.lora_up.weight"] = np.ones((32, 1), np.float32)
    url, _ = upload(server, save(tensors))
    refused = server.client.get(url, params={"format": "kohya", "dtype": "float16"})
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/query/dtype")
    assert server.client.get(url, params={"format": "kohya", "dtype": "bfloat16"}).status_code == 200


@pytest.mark.parametrize("alpha", [-2.0, 1e-30])
def test_an_alpha_that_peft_does_not_take_goes_into_the_factors(server: Any, tmp_path: Path, alpha: float) -> None:
    content = file_of({f"{UNET}_attn1_to_q": (4, 32, 32)}, alpha)
    url, _ = upload(server, content)
    expected = {path.removeprefix("unet."): delta for path, delta in deltas(content, tmp_path / "a").items()}
    same(expected, deltas(server.client.get(url).content, tmp_path / "b"), 1e-6)


def test_a_fused_projection_in_other_proportions_is_refused(server: Any) -> None:
    random = np.random.default_rng(1)
    start = "transformer.single_transformer_blocks.0"
    tensors = {
        f"{start}.{layer}.lora_{side}.weight": random.standard_normal(shape).astype(np.float32)
        for layer, rows in (("attn.to_q", 32), ("proj_mlp", 100))
        for side, shape in (("A", (2, 32)), ("B", (rows, 2)))
    }
    url, _ = upload(server, save(tensors))
    refused = server.client.get(url, params={"format": "kohya"})
    assert refused.status_code == 422
    assert "not in the proportion" in refused.json()["detail"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_diffusers_and_peft_load_what_is_written(server: Any, tmp_path: Path) -> None:
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from peft import PeftModel

    def unet() -> Any:
        return UNet2DConditionModel(
            block_out_channels=(32, 64, 64, 64), cross_attention_dim=48, attention_head_dim=8, norm_num_groups=8
        )

    start = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"
    sizes = {
        f"{start}_attn1_to_q": (4, 64, 64),
        f"{start}_attn2_to_k": (4, 64, 48),
        f"{start}_ff_net_0_proj": (4, 512, 64),
    }
    mixed = sizes | {f"{start}_attn2_to_k": (2, 64, 48)}

    def check(model: Any, name: str, expected: Deltas) -> None:
        layers = {path: module for path, module in model.named_modules() if hasattr(module, "lora_A")}
        assert layers.keys() == expected.keys()
        for path, layer in layers.items():
            with torch.no_grad():
                found = layer.get_delta_weight(name).double().numpy()
            np.testing.assert_allclose(found, expected[path], atol=1e-4)

    # of a kohya file diffusers applies alpha right where it is the same in all attention layers
    for layout, content in (("diffusers", file_of(mixed)), ("kohya", file_of(sizes, 3.0)), ("peft", file_of(mixed))):
        url, _ = upload(server, content)
        told = {path.removeprefix("unet."): delta for path, delta in deltas(content, tmp_path / layout).items()}
        answer = server.client.get(url, params={"format": layout})
        if layout == "peft":
            with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
                archive.extractall(tmp_path / "packed")
            check(PeftModel.from_pretrained(unet(), tmp_path / "packed").base_model.model, "default", told)
            continue
        file = tmp_path / f"{layout}.safetensors"
        file.write_bytes(answer.content)
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
        model = unet()
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(
            state, network_alphas=alphas, unet=model, adapter_name="one", metadata=metadata
        )
        check(model, "one", told)
