"""The names that modules have in the first implementation of each model, as rules to their names in diffusers.

A rule set is a function from the model's modules to (native name, targets). Several targets are the parts of a fused
projection in order of their rows; `SWAP` as second target says that the rows hold (shift, scale) where diffusers
has (scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Modules = dict[str, list[int]]
Rules = Callable[[Modules], Iterator[tuple[str, list[str]]]]
SWAP, _MAX_BLOCKS = "swap", 100


def _blocks(native: str, target: str, rules: dict[str, str]) -> Rules:
    """One rule set for blocks with a number: parts of fused targets are separated by blanks."""

    def generate(modules: Modules) -> Iterator[tuple[str, list[str]]]:
        for number in range(_MAX_BLOCKS):
            before = target.format(number)
            if not any(path.startswith(before) for path in modules):
                return
            for name, parts in rules.items():
                yield native.format(number) + name, [before + part for part in parts.split()]

    return generate


def _single(rules: dict[str, str]) -> Rules:
    def generate(modules: Modules) -> Iterator[tuple[str, list[str]]]:
        for name, parts in rules.items():
            yield name, parts.split()

    return generate


def _join(*sets: Rules) -> Rules:
    def generate(modules: Modules) -> Iterator[tuple[str, list[str]]]:
        for rules in sets:
            yield from rules(modules)

    return generate


def _renamed(*pairs: tuple[str, str], start: str = "") -> Rules:
    """Every module under the name that it had before a sequence of replacements (regular expressions)."""

    def generate(modules: Modules) -> Iterator[tuple[str, list[str]]]:
        for path in modules:
            if path.startswith(start):
                name = path
                for pattern, replacement in pairs:
                    name = re.sub(pattern, replacement, name)
                if name != path:
                    yield name, [path]

    return generate


_QKV, _ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"

_DOUBLE_BLOCK = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
}
"""The double blocks of FLUX, which ComfyUI calls those of HunyuanVideo alike."""

FLUX = _join(
    _blocks(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            **_DOUBLE_BLOCK,
            "img_attn.norm.query_norm": "attn.norm_q",
            "img_attn.norm.key_norm": "attn.norm_k",
            "txt_attn.norm.query_norm": "attn.norm_added_q",
            "txt_attn.norm.key_norm": "attn.norm_added_k",
            "processor.qkv_lora1": _QKV,
            "processor.qkv_lora2": _ADDED,
            "processor.proj_lora1": "attn.to_out.0",
            "processor.proj_lora2": "attn.to_add_out",
        },
    ),
    _blocks(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "linear1": f"{_QKV} proj_mlp",
            "linear2": "proj_out",
            "modulation.lin": "norm.linear",
            "norm.query_norm": "attn.norm_q",
            "norm.key_norm": "attn.norm_k",
            "processor.qkv_lora": _QKV,
            "processor.proj_lora": "proj_out",
        },
    ),
    _single(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": f"norm_out.linear {SWAP}",
        }
    ),
)

_APPROXIMATOR = "distilled_guidance_layer.layers.{}."
CHROMA = _join(FLUX, _blocks(_APPROXIMATOR, _APPROXIMATOR, {"in_layer": "linear_1", "out_layer": "linear_2"}))

FLUX2 = _join(
    _blocks(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_attn.qkv": _QKV,
            "txt_attn.qkv": _ADDED,
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
    ),
    _blocks(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    ),
    _single(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": "norm_out.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        }
    ),
)

HUNYUAN = _join(
    _blocks(
        "double_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "img_attn_qkv": _QKV,
            "txt_attn_qkv": _ADDED,
            "img_attn_proj": "attn.to_out.0",
            "txt_attn_proj": "attn.to_add_out",
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
            # as ComfyUI calls them
            **_DOUBLE_BLOCK,
        },
    ),
    _blocks(
        "single_blocks.{}.",
        "single_transformer_blocks.{}.",
        {
            "linear1": f"{_QKV} proj_mlp",
            "linear2": "proj_out",
            "modulation.linear": "norm.linear",
            "modulation.lin": "norm.linear",
        },
    ),
    _blocks(
        "txt_in.individual_token_refiner.blocks.{}.",
        "context_embedder.token_refiner.refiner_blocks.{}.",
        {
            "self_attn_qkv": _QKV,
            "self_attn_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
    ),
    _single(
        {
            "img_in.proj": "x_embedder.proj",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
            "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
            "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
            "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
            "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": f"norm_out.linear {SWAP}",
        }
    ),
)

WAN = _join(
    _blocks(
        "blocks.{}.",
        "blocks.{}.",
        {
            **{
                f"{old}.{theirs}": f"{new}.{ours}"
                for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
            },
            **{
                f"{old}.{theirs}": f"{new}.{ours}"
                for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for theirs, ours in (("norm_q", "norm_q"), ("norm_k", "norm_k"))
            },
            "cross_attn.k_img": "attn2.add_k_proj",
            "cross_attn.v_img": "attn2.add_v_proj",
            "cross_attn.norm_k_img": "attn2.norm_added_k",
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
        },
    ),
    _single(
        {
            "time_projection.1": "condition_embedder.time_proj",
            "head.head": "proj_out",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        }
    ),
)

_ZIMAGE_BLOCK = {"attention.qkv": "attention.to_q attention.to_k attention.to_v", "attention.out": "attention.to_out.0"}
ZIMAGE = _join(
    *(
        _blocks(f"{block}.{{}}.", f"{block}.{{}}.", _ZIMAGE_BLOCK)
        for block in ("layers", "noise_refiner", "context_refiner")
    )
)

_LUMINA_BLOCK = {
    "attention.qkv": _QKV,
    "attention.out": "attn.to_out.0",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "adaLN_modulation.1": "norm1.linear",
}
LUMINA2 = _join(
    *(
        _blocks(f"{block}.{{}}.", f"{block}.{{}}.", _LUMINA_BLOCK)
        for block in ("layers", "noise_refiner", "context_refiner")
    )
)

LTX2 = _join(
    _renamed(
        (r"^proj_in$", "patchify_proj"),
        (r"^audio_proj_in$", "audio_patchify_proj"),
        (r"^av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
        (r"^av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
        (r"^av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
        (r"^av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
        (r"^time_embed\.", "adaln_single."),
        (r"^audio_time_embed\.", "audio_adaln_single."),
        (r"norm_q$", "q_norm"),
        (r"norm_k$", "k_norm"),
    )
)

_KREA_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_KREA_BLOCK = {f"attn.{theirs}": f"attn.{ours}" for theirs, ours in _KREA_ATTENTION.items()} | {
    f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")
}
KREA2 = _join(
    _blocks("blocks.{}.", "transformer_blocks.{}.", _KREA_BLOCK),
    _blocks("txtfusion.layerwise_blocks.{}.", "text_fusion.layerwise_blocks.{}.", _KREA_BLOCK),
    _blocks("txtfusion.refiner_blocks.{}.", "text_fusion.refiner_blocks.{}.", _KREA_BLOCK),
    _single(
        {
            "first": "img_in",
            "last.linear": "final_layer.linear",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
        }
    ),
)

ANIMA = _join(
    _blocks(
        "blocks.{}.",
        "transformer_blocks.{}.",
        {
            **{
                f"{old}.{theirs}": f"{new}.{ours}"
                for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
                for theirs, ours in (
                    ("q_proj", "to_q"),
                    ("k_proj", "to_k"),
                    ("v_proj", "to_v"),
                    ("output_proj", "to_out.0"),
                    ("q_norm", "norm_q"),
                    ("k_norm", "norm_k"),
                )
            },
            **{
                f"adaln_modulation_{old}.{number}": f"{new}.linear_{number}"
                for old, new in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
                for number in (1, 2)
            },
            "mlp.layer1": "ff.net.0.proj",
            "mlp.layer2": "ff.net.2",
        },
    ),
    _single(
        {
            "x_embedder.proj.1": "patch_embed.proj",
            "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
            "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
            "t_embedding_norm": "time_embed.norm",
            "final_layer.linear": "proj_out",
            "final_layer.adaln_modulation.1": "norm_out.linear_1",
            "final_layer.adaln_modulation.2": "norm_out.linear_2",
        }
    ),
)

NATIVE_SD3 = _join(
    _blocks(
        "joint_blocks.{}.",
        "transformer_blocks.{}.",
        {
            "x_block.attn.qkv": _QKV,
            "context_block.attn.qkv": _ADDED,
            "x_block.attn.proj": "attn.to_out.0",
            "context_block.attn.proj": "attn.to_add_out",
            "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
        },
    ),
    lambda modules: (
        # of the last block diffusers has (scale, shift) where the first implementation has (shift, scale)
        (f"joint_blocks.{n}.context_block.adaLN_modulation.1", [f"transformer_blocks.{n}.norm1_context.linear", *swap])
        for n in range(_MAX_BLOCKS)
        if f"transformer_blocks.{n}.norm1_context.linear" in modules
        for swap in ([] if f"transformer_blocks.{n + 1}.norm1_context.linear" in modules else [SWAP],)
    ),
    _single(
        {
            "x_embedder.proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
            "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
            "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
            "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
            "final_layer.linear": "proj_out",
            "final_layer.adaLN_modulation.1": f"norm_out.linear {SWAP}",
        }
    ),
)
