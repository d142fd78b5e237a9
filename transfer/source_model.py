"""The source base model with adapters on it: one copy of the weights, whichever adapter is active."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from artifacts.errors import FieldError, RankwiseError, TransferRefused
from train.base_files import BaseFiles
from train.declared import is_declared, load_for_a_while
from train.quiet import peft_deprecations_ignored
from transfer.declared_adapter import DeclaredAdapter
from transfer.soft_prompt import PROMPT_TUNING, SoftPrompt, soft_type

KIND = "causal language model"


def load_base(base: BaseFiles, *, dtype: str = "float32", device: str = "cpu") -> Any:
    """The base model for evaluation. Raises RequestInvalid when it can not be loaded."""
    from transformers import AutoModelForCausalLM

    return base.load(AutoModelForCausalLM, KIND, dtype=dtype, device=device)


def load_adapted(base: BaseFiles, adapters: Mapping[str, Path], *, dtype: str = "float32", device: str = "cpu") -> Any:
    """The base model with these adapters, by name; the first is active.

    Args:
        adapters: folders that PEFT loads; one of prompt tuning, or of a type of our own, stands alone.

    Raises:
        RequestInvalid: the base model can not be loaded.
        TransferRefused: an adapter does not fit it, or is of a type that is not read.
    """
    from peft import PeftModel

    model = load_base(base, dtype=dtype, device=device)
    if any(map(is_declared, adapters.values())):
        return _declared(model, base.name, adapters)
    soft = {name: kind for name, folder in adapters.items() if (kind := soft_type(folder)) is not None}
    for name, kind in soft.items():
        if kind != PROMPT_TUNING or len(adapters) > 1:
            raise TransferRefused(
                f"The {name} adapter is of PEFT type {kind}, which a transfer does not read"
                f"{' beside another adapter' if kind == PROMPT_TUNING else ''}.",
                hint="Of the adapters that learn what stands before the input it reads PROMPT_TUNING.",
                errors=[FieldError("/adapter", f"is of PEFT type {kind}")],
            )
    loaded: Any = None
    with peft_deprecations_ignored():
        for name, folder in adapters.items():
            try:
                if loaded is None:
                    loaded = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
                else:
                    loaded.load_adapter(str(folder), adapter_name=name)
            except (ValueError, RuntimeError, KeyError) as error:
                raise TransferRefused(
                    f"The {name} adapter can not be put onto the base model {base.name!r}: {error}",
                    hint="It has to be an adapter that PEFT loads, of this base model.",
                    errors=[FieldError("/adapter", f"does not fit {base.name!r}")],
                ) from error
    loaded = loaded.requires_grad_(False).eval()
    return SoftPrompt(loaded).eval() if soft else loaded


def stands_alone(folder: Path) -> bool:
    """Whether no other adapter can be on the model beside this one."""
    return soft_type(folder) is not None or is_declared(folder)


def _declared(model: Any, base_name: str, adapters: Mapping[str, Path]) -> DeclaredAdapter:
    if len(adapters) > 1:
        raise ValueError("an adapter of a type of our own stands alone")
    ((name, folder),) = adapters.items()
    try:
        load_for_a_while(model, folder)
    except RankwiseError as error:
        raise TransferRefused(
            f"The {name} adapter can not be put onto the base model {base_name!r}: {error.detail}",
            hint="It has to be an adapter of this base model, of a type that leaves the weights as they are.",
            errors=[FieldError("/adapter", f"does not fit {base_name!r}"), *error.errors],
        ) from error
    return DeclaredAdapter(model.requires_grad_(False)).eval()
