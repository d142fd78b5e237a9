"""The lazy mapping from modules to factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from artifacts.adapter import Adapter

PREFIX = "base_model.model."


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {
        f"{PREFIX}layers.0.proj.lora_A.weight": torch.randn(4, 8),
        f"{PREFIX}layers.0.proj.lora_B.weight": torch.randn(6, 4),
        f"{PREFIX}conv.lora_A.weight": torch.randn(2, 3, 2, 5),
        f"{PREFIX}conv.lora_B.weight": torch.randn(7, 2, 1, 1),
        f"{PREFIX}embed.lora_embedding_A": torch.randn(4, 11),
        f"{PREFIX}embed.lora_embedding_B": torch.randn(6, 4),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["proj", "conv", "embed"],
        "rank_pattern": {"conv": 2},
        "alpha_pattern": {"embed": 1},
        "base_model_name_or_path": "tiny",
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def test_it_is_a_mapping_of_factors(directory: Path) -> None:
    adapter = Adapter.open(directory)
    assert sorted(adapter) == ["conv", "embed", "layers.0.proj"]
    assert len(adapter) == 3
    assert "elsewhere" not in adapter
    with pytest.raises(KeyError):
        adapter["elsewhere"]
    assert {path: factors.scaling for path, factors in adapter.items()} == {
        "conv": 4.0,
        "embed": 0.25,
        "layers.0.proj": 2.0,
    }
    assert {path: (tuple(f.A.shape), tuple(f.B.shape), f.rank) for path, f in adapter.items()} == {
        "conv": ((2, 30), (7, 2), 2),
        "embed": ((4, 11), (6, 4), 4),
        "layers.0.proj": ((4, 8), (6, 4), 4),
    }


def test_writing_to_a_view_does_not_reach_the_file(directory: Path) -> None:
    before = (directory / "adapter_model.safetensors").read_bytes()
    adapter = Adapter.open(directory)
    adapter["conv"].A.zero_()
    assert (directory / "adapter_model.safetensors").read_bytes() == before


def test_views_survive_release(tmp_path: Path) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(64, 512), torch.randn(512, 64)
    tensors = {f"{PREFIX}proj.lora_A.weight": A, f"{PREFIX}proj.lora_B.weight": B}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 64, "lora_alpha": 64, "target_modules": ["proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = Adapter.open(tmp_path)
    factors = adapter["proj"]
    adapter.release("proj")
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)


def test_tensors_need_no_alignment(tmp_path: Path) -> None:
    """The format allows a header of any length, and so tensors at odd addresses."""
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    raw = {f"{PREFIX}proj.lora_A.weight": A, f"{PREFIX}proj.lora_B.weight": B}
    header, body = {}, b""
    for name, tensor in raw.items():
        data = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * ((-len(text)) % 8 + 3)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = Adapter.open(tmp_path)["proj"]
    assert torch.equal(factors.A, A)
    assert torch.equal(factors.B, B)


def foreign(path: Path, tensors: dict[str, torch.Tensor]) -> Adapter:
    save_file(tensors, path)
    return Adapter.open(path)


def test_parts_of_a_fused_projection_make_its_delta(tmp_path: Path) -> None:
    torch.manual_seed(1)
    stem = "lora_unet_single_blocks_0_linear1"
    A, B = torch.randn(4, 6), torch.randn(42, 4)  # 3·6 rows of q, k and v, 24 of the MLP
    tensors = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(2.0)}
    adapter = foreign(tmp_path / "a.safetensors", tensors)
    block = "transformer.single_transformer_blocks.0"
    order = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    deltas = [adapter[path].scaling * adapter[path].B @ adapter[path].A for path in order]
    assert [len(delta) for delta in deltas] == [6, 6, 6, 24]
    torch.testing.assert_close(torch.cat(deltas), 0.5 * B @ A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_diagonal_parts_keep_their_own_components(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    stem = "lora_unet_double_blocks_0_txt_attn_qkv"
    A = torch.randn(6, 6, dtype=dtype)
    B = torch.block_diag(*(torch.randn(6, 2) for _ in range(3))).to(dtype)
    tensors = {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B, f"{stem}.alpha": torch.tensor(6.0)}
    adapter = foreign(tmp_path / "a.safetensors", tensors)
    order = [f"transformer.transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"]
    assert [adapter[path].rank for path in order] == [2, 2, 2]
    torch.testing.assert_close(torch.cat([adapter[path].B @ adapter[path].A for path in order]), B @ A)


def test_one_number_outside_of_its_block_keeps_the_parts_whole(tmp_path: Path) -> None:
    stem = "lora_unet_double_blocks_0_txt_attn_qkv"
    B = torch.block_diag(*(torch.randn(6, 2) for _ in range(3)))
    B[5, 3] = 1e-3  # not in a first row, which is looked at before the others
    tensors = {f"{stem}.lora_down.weight": torch.randn(6, 6), f"{stem}.lora_up.weight": B}
    adapter = foreign(tmp_path / "a.safetensors", tensors)
    assert {factors.rank for factors in adapter.values()} == {6}


def test_exchanged_halves(tmp_path: Path) -> None:
    stem = "lora_unet_final_layer_adaLN_modulation_1"
    A, B = torch.randn(2, 6), torch.randn(12, 2)
    adapter = foreign(tmp_path / "a.safetensors", {f"{stem}.lora_down.weight": A, f"{stem}.lora_up.weight": B})
    torch.testing.assert_close(adapter["transformer.norm_out.linear"].B, torch.cat([B[6:], B[:6]]))


def test_a_core_is_contracted_with_the_down_matrix(tmp_path: Path) -> None:
    torch.manual_seed(3)
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, core, up = torch.randn(4, 8, 1, 1), torch.randn(4, 4, 3, 3), torch.randn(8, 4, 1, 1)
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": core, f"{stem}.lora_up.weight": up}
    factors = foreign(tmp_path / "a.safetensors", tensors)["unet.down_blocks.0.resnets.0.conv1"]
    image = torch.randn(1, 8, 5, 5)
    kernel = (factors.B @ factors.A).reshape(8, 8, 3, 3)
    one_by_one = torch.nn.functional.conv2d
    expected = one_by_one(one_by_one(one_by_one(image, down), core, padding=1), up)
    torch.testing.assert_close(torch.nn.functional.conv2d(image, kernel, padding=1), expected, rtol=1e-4, atol=1e-4)
