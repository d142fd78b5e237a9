from __future__ import annotations

import pytest

from artifacts.identification import identify
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo


def header(*keys: str) -> SafetensorsHeader:
    return SafetensorsHeader({key: TensorInfo(key, "F32", (1,), 0, 4) for key in keys}, {}, 0, 0)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", "peft"),
        ("base_model.model.model.embed_tokens.lora_embedding_B", "peft"),
        ("base_model.model.model.layers.0.q_proj.lora_E", "adalora"),
        ("lora_unet_down_blocks_0_to_q.lora_down.weight", "kohya"),
        ("lora_te1_text_model_0_q_proj.lora_up.weight", "kohya"),
        ("lora_transformer_blocks_0_to_q.lora_down.weight", "onetrainer"),
        ("lora_unet_x.hada_w1_a", "kohya"),
        ("lora_unet_x.lokr_w2_b", "kohya"),
        ("lora_unet_x.oft_blocks", "kohya"),
        ("lora_unet_x.on_input", "kohya"),
        ("diffusion_model.x.lokr_w1", "comfy"),
        ("unet.down_blocks.0.to_q.lora_A.weight", "diffusers"),
        ("transformer.x.lora.down.weight", "diffusers"),
        ("down_blocks.0.attn1.processor.to_q_lora.down.weight", "attention-processors"),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "comfy"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "xlabs"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "bfl"),
        ("layers.0.attention.wq.lora_A.weight", "mistral"),
        ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
        ("layers.0.attention.qkv.lora_A.weight", "lora-bare"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx"),
        ("blocks.0.attn.lora_a", "lora-lowercase"),
        ("text_encoders.qwen25_7b.transformer.model.layers.0.self_attn.q_proj.lora_A.weight", "text-encoder"),
        ("te.model.layers.0.self_attn.q_proj.lora_down.weight", "text-encoder"),
        ("te2.model.layers.0.self_attn.q_proj.lora_A.weight", "text-encoder"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "comfy"),
        ("tea.layers.0.q_proj.lora_A.weight", "lora-bare"),
        ("ip_adapter.1.to_k_ip.weight", "ip-adapter"),
        ("emb_params", "textual-inversion"),
        ("x.alpha", "alpha-only"),
        ("model.layers.0.self_attn.q_proj.weight", "full-model"),
        ("unet:0:down", "cloneofsimo"),
        ("encoder.conv_in.weight", "vae"),
        ("strange", "unknown"),
    ],
)
def test_layouts_are_named(key: str, name: str) -> None:
    found = identify(header(key))
    assert found.name == name
    assert found.sentence.startswith("it looks like ")


def test_empty_and_mixed_files() -> None:
    assert identify(header()).name == "empty"
    mixed = identify(header("base_model.model.a.lora_A.weight", "lora_unet_a.lora_down.weight"))
    assert mixed.name == "mixed"
    assert "kohya" in mixed.description
    assert "PEFT" in mixed.description


def test_text_encoders_of_onetrainer_files_carry_kohya_names() -> None:
    assert identify(header("lora_te_x.lora_down.weight", "lora_transformer_y.lora_down.weight")).name == "onetrainer"


def test_text_encoders_beside_other_names_are_names_without_a_prefix() -> None:
    encoder = "te.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert identify(header(encoder, "model.blocks.0.q.lora_A.weight")).name == "lora-bare"
    mixed = identify(header(encoder, "diffusion_model.blocks.0.self_attn.q.lora_A.weight"))
    assert mixed.name == "mixed"
    assert "a ComfyUI or ai-toolkit LoRA" in mixed.description
