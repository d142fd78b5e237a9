"""DoRA (arXiv:2402.09353), by PEFT."""

from __future__ import annotations

from typing import Any

from train.methods.lora import Lora


class Dora(Lora):
    """m·(W + scaling·B·A)/‖W + scaling·B·A‖ with a learned m per output; the file holds m besides A and B."""

    def fields(self) -> dict[str, Any]:
        return super().fields() | {"use_dora": True}
