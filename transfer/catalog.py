"""The table of transfer methods: name → options, implementation, source and capabilities. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from artifacts.menu import find_row, parse_options
from transfer.options import (
    CopyOptions,
    CrossLoraOptions,
    LorasuiteOptions,
    LoraXOptions,
    ProloraOptions,
    RefreshOptions,
    SeedsOnlyOptions,
    TransferOptions,
    TransLoraOptions,
)

Need = Literal["seeds", "discriminator", "inputs"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method asks for and gives.

    Attributes:
        trains: a new adapter is trained; else its factors are computed from the old ones.
        any_source: takes an adapter of any kind that PEFT loads; else a plain LoRA.
        across_widths: the target base may have other widths.
        needs: what has to be given besides the adapter and the target base; discriminator only with the filter of that
            name.
    """

    trains: bool
    any_source: bool
    across_widths: bool
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True, slots=True)
class TransferMethod:
    """One row of the menu. `implementation` is imported in a worker only: a `transfer.weight_protocol.WeightMethod`, or
    for a method that trains a `transfer.sources.PromptSource`.

    Attributes:
        when: when to take it rather than another, whole sentences.
        cost: time.
    """

    name: str
    title: str
    summary: str
    when: str
    cost: str
    options: type[TransferOptions]
    implementation: str
    arxiv: str | None
    reference_url: str
    capabilities: Capabilities

    def load(self) -> Any:
        """Import the implementation (torch)."""
        module, _, name = self.implementation.partition(":")
        return getattr(importlib.import_module(module), name)


_ROWS = (
    TransferMethod(
        name="trans-lora",
        title="Trans-LoRA",
        summary="The target base invents inputs after a few seeds, a filter keeps those that look like the task, the "
        "source adapter answers them, and a new adapter learns the answers.",
        when="To move an adapter to a base of another size, family or tokenizer without its training data.",
        cost="rows over the acceptance rate generated inputs, as many looks of the filter, rows answers of the source, "
        "and a training.",
        options=TransLoraOptions,
        implementation="transfer.methods.trans_lora:TransLora",
        arxiv="2405.17258",
        reference_url="https://arxiv.org/abs/2405.17258",
        capabilities=Capabilities(trains=True, any_source=True, across_widths=True, needs=("seeds", "discriminator")),
    ),
    TransferMethod(
        name="refresh",
        title="Refresh",
        summary="The source adapter answers inputs that were kept, and a new adapter learns the answers.",
        when="When real inputs may be kept: nothing has to be invented or filtered.",
        cost="An answer of the source for each input, and a training.",
        options=RefreshOptions,
        implementation="transfer.methods.refresh:Refresh",
        arxiv="2608.20918",
        reference_url="https://arxiv.org/abs/2608.20918",
        capabilities=Capabilities(trains=True, any_source=True, across_widths=True, needs=("inputs",)),
    ),
    TransferMethod(
        name="seeds-only",
        title="Seeds only",
        summary="The source adapter answers the seeds, and a new adapter learns those few answers.",
        when="As the control of trans-lora: easy tasks need no more.",
        cost="A short training.",
        options=SeedsOnlyOptions,
        implementation="transfer.methods.seeds_only:SeedsOnly",
        arxiv="2405.17258",
        reference_url="https://arxiv.org/abs/2405.17258",
        capabilities=Capabilities(trains=True, any_source=True, across_widths=True, needs=("seeds",)),
    ),
    TransferMethod(
        name="lorasuite",
        title="LoRASuite",
        summary="A start computed from both bases' weights, and a short training on answers of the source adapter.",
        when="When some inputs may be kept and training shall be short. Both bases need layers named as Llama's.",
        cost="Both bases' weights in memory at once, pseudo-inverses of words and MLPs, and a short training.",
        options=LorasuiteOptions,
        implementation="transfer.methods.lorasuite:LoraSuite",
        arxiv="2505.13515",
        reference_url="https://arxiv.org/abs/2505.13515",
        capabilities=Capabilities(trains=True, any_source=False, across_widths=True, needs=("inputs",)),
    ),
    TransferMethod(
        name="copy",
        title="Copy",
        summary="The factors as they are, for the same names and shapes.",
        when="When the target base is a light continuation of the source. Measure it: between independent models it "
        "can be worse than no adapter.",
        cost="None.",
        options=CopyOptions,
        implementation="transfer.methods.copy:transport",
        arxiv="2608.20918",
        reference_url="https://arxiv.org/abs/2608.20918",
        capabilities=Capabilities(trains=False, any_source=False, across_widths=False),
    ),
    TransferMethod(
        name="lora-x",
        title="LoRA-X",
        summary="ΔW projected onto the leading singular vectors of the target's weights.",
        when="Between variants of one base of the same widths, for adapters that were trained inside its subspace.",
        cost="An SVD of every adapted weight of both bases, once.",
        options=LoraXOptions,
        implementation="transfer.methods.lora_x:transport",
        arxiv="2501.16559",
        reference_url="https://arxiv.org/abs/2501.16559",
        capabilities=Capabilities(trains=False, any_source=False, across_widths=True),
    ),
    TransferMethod(
        name="prolora",
        title="ProLoRA",
        summary="The parts of ΔW inside and outside of the source weights' spaces, each put into the target's.",
        when="Between variants of one base of the same widths, for any LoRA.",
        cost="An SVD of every adapted weight of both bases, once. The rank doubles.",
        options=ProloraOptions,
        implementation="transfer.methods.prolora:transport",
        arxiv="2506.04244",
        reference_url="https://arxiv.org/abs/2506.04244",
        capabilities=Capabilities(trains=False, any_source=False, across_widths=False),
    ),
    TransferMethod(
        name="cross-lora",
        title="Cross-LoRA",
        summary="The core of ΔW in the source weights' singular vectors, put into those of the target.",
        when="As a control: between families it was measured to change nothing of the target's answers.",
        cost="An SVD of every adapted weight of both bases, once.",
        options=CrossLoraOptions,
        implementation="transfer.methods.cross_lora:transport",
        arxiv="2508.05232",
        reference_url="https://arxiv.org/abs/2508.05232",
        capabilities=Capabilities(trains=False, any_source=False, across_widths=True),
    ),
)

METHODS: Mapping[str, TransferMethod] = {row.name: row for row in _ROWS}


def find_method(name: str) -> TransferMethod:
    """The row of a method. Raises RequestInvalid, with the names that exist, when there is none."""
    return find_row(METHODS, "transfer", name)


def parse_parameters(method: str, parameters: Mapping[str, Any]) -> TransferOptions:
    """Validate `parameters` against the options of `method`.

    Raises:
        RequestInvalid: unknown method or parameter, or a value out of range; each finding with its JSON pointer.
    """
    return parse_options(find_method(method).options, "transfer", "transfer", method, parameters)
