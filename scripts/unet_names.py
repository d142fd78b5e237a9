"""The names of UNets in latent-diffusion, which kohya's SDXL trainer keeps, and of AnimateDiff's motion modules."""

from __future__ import annotations

import re
from collections.abc import Iterator

Modules = dict[str, list[int]]

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet(modules: Modules) -> Iterator[tuple[str, list[str]]]:
    """The names of the latent-diffusion repository, which kohya's SDXL trainer keeps."""
    for path in modules:
        name = _ldm_name(path, modules)
        if name is not None:
            yield name, [path]


def _ldm_name(path: str, modules: Modules) -> str | None:
    fixed = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    if path in fixed:
        return fixed[path]
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path)
    if found:
        side, block, kind, number, rest = found.groups()
        i, j = int(block), int(number)
        if kind == "downsamplers":
            return f"input_blocks.{3 * i + 3}.0.op"
        if kind == "upsamplers":
            place = 2 if f"up_blocks.{i}.attentions.0.proj_in" in modules else 1
            return f"output_blocks.{3 * i + 2}.{place}.conv"
        start = f"input_blocks.{3 * i + j + 1}" if side == "down" else f"output_blocks.{3 * i + j}"
        return f"{start}.0.{_resnet(rest)}" if kind == "resnets" else f"{start}.1.{rest}"
    found = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", path)
    if found:
        kind, number, rest = found.groups()
        return f"middle_block.{2 * int(number)}.{_resnet(rest)}" if kind == "resnets" else f"middle_block.1.{rest}"
    return None


def _resnet(rest: str) -> str:
    return next(theirs for theirs, ours in _RESNET.items() if ours == rest)


def motion(modules: Modules) -> Iterator[tuple[str, list[str]]]:
    """Motion modules of AnimateDiff's repository."""
    for path in modules:
        found = re.fullmatch(r"(.+\.motion_modules\.\d+)\.(transformer_blocks\.\d+)\.attn([12])\.(to_\w+)(\.0)?", path)
        if found:
            start, block, attention, layer, tail = found.groups()
            name = f"{start}.temporal_transformer.{block}.attention_blocks.{int(attention) - 1}.{layer}{tail or ''}"
            yield name, [path]
        elif ".motion_modules." in path:
            head, _, rest = path.partition(".motion_modules.")
            number, _, inner = rest.partition(".")
            yield f"{head}.motion_modules.{number}.temporal_transformer.{inner}", [path]
