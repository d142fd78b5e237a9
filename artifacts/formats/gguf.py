"""llama.cpp's adapters, GGUF files: `blk.0.attn_q.weight.lora_a`, one alpha, and the base model's architecture.

Of some families llama.cpp has the two rows of every pair that the rotary embedding rotates side by side; transformers
has the first of all pairs of a head, then the second. Neither tensors nor header tell the number of heads: it is
in config.json of the base model. (https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from artifacts.errors import ConfigRefused
from artifacts.formats.pairs import Pair
from artifacts.formats.settings import whole
from artifacts.formats.writing import Placed, Plan, Subject, pair_of, refuse, single
from artifacts.formats.written_config import most_common

BASE_CONFIG = "config.json"
"""The base model's configuration, as transformers has it."""
ALPHA_KEY = "adapter.lora.alpha"
A_END, B_END = ".weight.lora_a", ".weight.lora_b"
EMBEDDING = "model.embed_tokens"

_BLOCK = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)")
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,4})\.(.+)")
_HEAD = "lm_head"
_OUTSIDE = {"output": _HEAD, "token_embd": EMBEDDING}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp.

    Attributes:
        name: as general.architecture has it.
        classes: of transformers, as `architectures` in config.json has them.
        names: name inside a block → name inside a layer.
        interleaved: rows of queries and keys have the order of this module's docstring.
        head: whether the model may have an output layer of its own.
    """

    name: str
    classes: tuple[str, ...]
    names: Mapping[str, str]
    interleaved: bool = False
    head: bool = True

    def path(self, stem: str) -> str | None:
        """`blk.0.attn_q` → `model.layers.0.self_attn.q_proj`; None if the family has no such module."""
        if stem in _OUTSIDE:
            return _OUTSIDE[stem]
        found = _BLOCK.fullmatch(stem)
        inner = self.names.get(found[2]) if found is not None else None
        return None if found is None or inner is None else f"model.layers.{found[1]}.{inner}"

    def stem(self, path: str) -> str | None:
        """The reverse of `path`."""
        for name, outside in _OUTSIDE.items():
            if path == outside:
                return name
        found = _LAYER.fullmatch(path)
        inner = next((name for name, there in self.names.items() if found is not None and there == found[2]), None)
        return None if found is None or inner is None else f"blk.{found[1]}.{inner}"

    def turns(self, path: str) -> bool:
        """Whether the rows of the module have another order here."""
        return self.interleaved and path.endswith((".q_proj", ".k_proj"))


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.name: family
        for family in (
            Family("llama", ("LlamaForCausalLM", "MistralForCausalLM"), _ATTENTION | _GATED, interleaved=True),
            Family("granite", ("GraniteForCausalLM",), _ATTENTION | _GATED, interleaved=True),
            Family("smollm3", ("SmolLM3ForCausalLM",), _ATTENTION | _GATED, interleaved=True),
            Family("olmo", ("OlmoForCausalLM",), _ATTENTION | _GATED, interleaved=True),
            Family("olmo2", ("Olmo2ForCausalLM",), _ATTENTION | _GATED),
            Family("qwen2", ("Qwen2ForCausalLM",), _ATTENTION | _GATED),
            Family("qwen3", ("Qwen3ForCausalLM",), _ATTENTION | _GATED),
            Family("gemma", ("GemmaForCausalLM",), _ATTENTION | _GATED, head=False),
            Family("gemma2", ("Gemma2ForCausalLM",), _ATTENTION | _GATED, head=False),
            Family("gemma3", ("Gemma3ForCausalLM",), _ATTENTION | _GATED, head=False),
            Family("phi3", ("Phi3ForCausalLM",), _FUSED),
            Family(
                "starcoder2",
                ("Starcoder2ForCausalLM",),
                _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
            ),
        )
    }
)
"""The architectures of which every row's place is known here, by llama.cpp's names."""


def head_rows(path: str, d_out: int, config: Mapping[str, Any]) -> int:
    """Rows of one head of the queries or keys at `path`, by config.json of the base model.

    Raises:
        ConfigRefused: the number of heads is missing, or does not divide the rows.
    """
    field = "num_attention_heads"
    if path.endswith(".k_proj") and config.get("num_key_value_heads") is not None:
        field = "num_key_value_heads"
    heads = whole(config, field, f"{BASE_CONFIG}: ")
    if d_out % (2 * heads):
        raise ConfigRefused(f"{BASE_CONFIG}: {d_out} rows of {path} are not those of {heads} heads.")
    return d_out // heads


class GgufWriter:
    """One GGUF file, as convert_lora_to_gguf.py makes it: factors under llama.cpp's names, and one alpha."""

    name = "gguf"

    def plan(self, subject: Subject) -> Plan:
        config = subject.base_config
        if config is None:
            refuse(
                self.name,
                f"the architecture and the heads of its base model, which {BASE_CONFIG} tells, are not known here",
                f"Send {BASE_CONFIG} of the base model along with the adapter, or register a folder as its base model.",
            )
        family = self._family(config)
        pairs = [self._pair(item, family, config, subject) for item in subject.placed]
        alpha = self._alpha(pairs)
        told = [replace(pair, told=alpha / pair.rank) for pair in pairs]
        values: dict[str, str | float] = {
            "general.architecture": family.name,
            "general.type": "adapter",
            "adapter.type": "lora",
            ALPHA_KEY: alpha,
        }
        if subject.manifest.base_model is not None:
            values["general.base_model.0.name"] = subject.manifest.base_model
        return Plan(tuple(told), values=values)

    def _family(self, config: Mapping[str, Any]) -> Family:
        named = config.get("architectures")
        name = named[0] if isinstance(named, list) and named else None
        found = next((family for family in FAMILIES.values() if name in family.classes), None)
        if found is None:
            known = ", ".join(item for family in FAMILIES.values() for item in family.classes)
            refuse(self.name, f"the base model is a {str(name)[:80]}; known are {known}")
        return found

    def _pair(self, item: Placed, family: Family, config: Mapping[str, Any], subject: Subject) -> Pair:
        path, module = item.path, item.module
        stem = family.stem(path) if not item.component else None
        if stem is None or module.kind == "conv":
            refuse(self.name, f"llama.cpp's {family.name} has no module {module.path!r}")
        if (module.kind == "embedding") is not (path == EMBEDDING):
            refuse(self.name, f"{path!r} is no {module.kind} layer there")
        if path == _HEAD and (not family.head or config.get("tie_word_embeddings") is True):
            refuse(self.name, "it adapts lm_head, and llama.cpp's model has no such layer: it uses the embedding")
        pair = pair_of(single(item), (f"{stem}{A_END}", f"{stem}{B_END}", ""), subject)
        if not family.turns(path):
            return replace(pair, a_turned=path == EMBEDDING)
        try:
            return replace(pair, head_rows=head_rows(path, module.d_out, config))
        except ConfigRefused as error:
            refuse(self.name, error.detail.rstrip("."))

    def _alpha(self, pairs: list[Pair]) -> float:
        """The alpha of most pairs, as float32 has it. llama.cpp takes 0 for none, which means a scaling of 1."""
        alphas = [pair.alpha for pair in pairs if pair.alpha]
        alpha: float = most_common(alphas) if alphas else float(pairs[0].rank)
        try:
            (single_precision,) = struct.unpack("<f", struct.pack("<f", alpha))
        except OverflowError:
            single_precision = 0.0
        if not single_precision:
            refuse(self.name, f"its alpha is {alpha:g}, which float32 can not hold")
        return float(single_precision)
