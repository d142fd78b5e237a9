"""Rank-stabilised LoRA (arXiv:2312.03732), by PEFT."""

from __future__ import annotations

from typing import Any

from train.methods.lora import Lora


class RsLora(Lora):
    """scaling = alpha/√r."""

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"use_rslora": True}
