"""The attention of diffusers' UNets as a processor whose middle can be another one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from artifacts.errors import ComposeRefused, FieldError

_PLAIN = ("AttnProcessor", "AttnProcessor2_0")


class PlainAttention:
    """What diffusers' own processor computes. Subclasses change `attend`.

    It calls to_q, to_k, to_v and to_out as modules, which may hold adapters.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        del args, kwargs
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        mixed = self.attend(attn, hidden_states, context, attention_mask).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
        if len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / float(attn.rescale_output_factor)

    def attend(self, attn: Any, states: Tensor, context: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(batch, heads, cells, d) before the output's projection, from (batch, cells, width) of states."""
        query, key, value = query_of(attn, states), key_of(attn, context), value_of(attn, context)
        return attended(attn, query, key, value, given_mask(attn, attention_mask, context))


def query_of(attn: Any, states: Tensor) -> Tensor:
    """(batch, heads, cells, d)."""
    query = _heads(attn.to_q(states), attn.heads)
    found: Tensor = query if attn.norm_q is None else attn.norm_q(query)
    return found


def key_of(attn: Any, context: Tensor) -> Tensor:
    """(batch, heads, tokens, d)."""
    key = _heads(attn.to_k(context), attn.heads)
    found: Tensor = key if attn.norm_k is None else attn.norm_k(key)
    return found


def value_of(attn: Any, context: Tensor) -> Tensor:
    """(batch, heads, tokens, d)."""
    return _heads(attn.to_v(context), attn.heads)


def attended(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale·QKᵀ + mask)·V by the fused kernel."""
    found: Tensor = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attn.scale)
    return found


def probabilities_of(attn: Any, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale·QKᵀ + mask) in float32, (batch, heads, cells, tokens)."""
    scores = attn.scale * (query.float() @ key.float().transpose(-1, -2))
    found: Tensor = (scores if mask is None else scores + mask.float()).softmax(dim=-1)
    return found


def given_mask(attn: Any, attention_mask: Tensor | None, context: Tensor) -> Tensor | None:
    """The mask that the UNet was called with, (batch, heads, 1, tokens)."""
    if attention_mask is None:
        return None
    mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
    found: Tensor = mask.view(len(context), attn.heads, -1, mask.shape[-1])
    return found


def check_plain(path: str, layer: Any) -> None:
    """Raises ComposeRefused when a layer attends by fused projections, xformers or another way of its own."""
    kind = type(layer.processor).__name__
    if kind not in _PLAIN:
        raise ComposeRefused(
            f"The attention layer {path} runs by {kind}, which forms no attention map.",
            hint="Undo it: unfuse_qkv_projections(), disable_xformers_memory_efficient_attention() or the like.",
            errors=[FieldError("/base_model", f"{path} runs by {kind}")],
        )


def _heads(states: Tensor, heads: int) -> Tensor:
    """(batch, n, heads·d) → (batch, heads, n, d)."""
    batch, cells, width = states.shape
    return states.view(batch, cells, heads, width // heads).transpose(1, 2)
