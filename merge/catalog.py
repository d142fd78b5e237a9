"""The table of merge methods: name → options, implementation, source and capabilities. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from artifacts.menu import find_row, parse_options
from merge.options import CatOptions, LegoOptions, LinearOptions, MergeOptions, SvdOptions


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a method can take.

    Attributes:
        negative_weights: weights below 0 are meaningful.
        lora_bias: biases of lora_B (PEFT `lora_bias`) are summed exactly; otherwise such adapters are refused.
        exact_sum: the result equals Σ wᵢ·ΔWᵢ whenever the output rank allows it.
    """

    negative_weights: bool
    lora_bias: bool
    exact_sum: bool


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """One row of the menu. `implementation` is imported in a worker only."""

    name: str
    title: str
    summary: str
    options: type[MergeOptions]
    implementation: str
    arxiv: str | None
    reference_url: str
    capabilities: Capabilities

    def load(self) -> Callable[..., Any]:
        """Import the implementation (torch)."""
        module, _, function = self.implementation.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


_ROWS = (
    MergeMethod(
        name="lego",
        title="LoRA-LEGO",
        summary="Clusters the rank components of all adapters per module by k-means; each cluster's reweighted mean "
        "becomes one rank component of the merged adapter.",
        options=LegoOptions,
        implementation="merge.methods.lego:merge",
        arxiv="2409.16167",
        reference_url="https://arxiv.org/abs/2409.16167",
        capabilities=Capabilities(negative_weights=False, lora_bias=False, exact_sum=False),
    ),
    MergeMethod(
        name="cat",
        title="Concatenation",
        summary="Stacks the factors: the exact weighted sum, at rank Σ rᵢ.",
        options=CatOptions,
        implementation="merge.methods.cat:merge",
        arxiv=None,
        reference_url="https://huggingface.co/docs/peft/developer_guides/lora#merge-lora-weights-into-the-base-model",
        capabilities=Capabilities(negative_weights=True, lora_bias=True, exact_sum=True),
    ),
    MergeMethod(
        name="svd",
        title="Truncated SVD",
        summary="The best approximation of the weighted sum at a given rank, by an exact SVD of its small core.",
        options=SvdOptions,
        implementation="merge.methods.svd:merge",
        arxiv=None,
        reference_url="https://doi.org/10.1007/BF02288367",
        capabilities=Capabilities(negative_weights=True, lora_bias=False, exact_sum=True),
    ),
    MergeMethod(
        name="linear",
        title="Task arithmetic",
        summary="λ·Σ wᵢ·ΔWᵢ on the deltas themselves, re-expressed at its own (or a given) rank; no cross terms.",
        options=LinearOptions,
        implementation="merge.methods.linear:merge",
        arxiv="2212.04089",
        reference_url="https://arxiv.org/abs/2212.04089",
        capabilities=Capabilities(negative_weights=True, lora_bias=True, exact_sum=True),
    ),
)

METHODS: Mapping[str, MergeMethod] = {row.name: row for row in _ROWS}


def find_method(name: str) -> MergeMethod:
    """The row of a method. Raises RequestInvalid, with the names that exist, when there is none."""
    return find_row(METHODS, "merge", name)


def parse_parameters(method: str, parameters: Mapping[str, Any]) -> MergeOptions:
    """Validate `parameters` against the options of `method`.

    Raises:
        RequestInvalid: unknown method or parameter, or a value out of range; each finding with its JSON pointer.
    """
    return parse_options(find_method(method).options, "merge", "merge", method, parameters)
