"""A model with learned vectors before its input (prompt tuning), called as any other model is.

PEFT's own forward pass puts the vectors before the padding and gives up the positions, and puts them in again at every
step of a generation: a padded batch would be answered otherwise than its rows alone. Here they stand right before the
first word of every row, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from artifacts.layout import CONFIG_NAME

PROMPT_TUNING = "PROMPT_TUNING"
_OTHERS = frozenset({"P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE"})


def soft_type(folder: Path) -> str | None:
    """The `peft_type` of an adapter that learns what stands before the input, or None: it changes layers."""
    found = str(json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("peft_type"))
    return found if found == PROMPT_TUNING or found in _OTHERS else None


class SoftPrompt(nn.Module):
    """A PEFT model with one adapter of prompt tuning; rows are padded on the left or not at all."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base = model.get_base_model()
        self.vectors: Tensor = model.get_prompt(batch_size=1)[0].detach()
        self.words = self.base.get_input_embeddings()
        self.config, self.generation_config = self.base.config, self.base.generation_config
        self._active = True

    @property
    def virtual_tokens(self) -> int:
        """How many vectors there are."""
        return len(self.vectors) if self._active else 0

    def set_adapter(self, name: str) -> None:
        """There is one."""
        del name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model alone."""
        self._active = False
        try:
            yield
        finally:
            self._active = True

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> Any:
        """As the base model's, with the vectors before what the cache begins with.

        Args:
            input_ids, attention_mask, position_ids: of the words alone; the mask's zeros come before its ones.
        """
        begun = past_key_values is not None and past_key_values.get_seq_length() > 0
        given: dict[str, Any] = {"input_ids": input_ids}
        if self._active and not begun:
            given = {"inputs_embeds": self._placed(input_ids, attention_mask)}
        if attention_mask is not None:
            mask = torch.cat([attention_mask, attention_mask.new_ones(len(input_ids), self.virtual_tokens)], dim=1)
            positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
            if begun:
                positions = positions[:, -input_ids.shape[1] :]
            given |= {"attention_mask": mask, "position_ids": positions}
        elif position_ids is not None:
            raise ValueError("positions without a mask do not say where a row begins")
        return self.base(**given, past_key_values=past_key_values, **more)

    def _placed(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """(n, length + vectors, width): every row's padding, the vectors, its words."""
        embedded = self.words(ids)
        vectors = self.vectors.to(embedded)
        padding = [0] * len(ids) if mask is None else (mask == 0).sum(dim=1).tolist()
        return torch.stack(
            [torch.cat([row[:count], vectors, row[count:]]) for row, count in zip(embedded, padding, strict=True)]
        )
