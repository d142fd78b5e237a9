"""The table of composition methods: name → options, implementation, source and capabilities. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.menu import find_row, parse_options
from compose.menu_row import Capabilities, Method
from compose.options.baselines import MergeOptions
from compose.options.common import ComposeOptions

_ROWS = (
    Method(
        name="merge",
        title="Weighted sum",
        summary="All adapters at once with their weights, under one prompt with all triggers.",
        when="To begin with, and to compare with: try several weights.",
        cost="As a plain generation.",
        options=MergeOptions,
        implementation="compose.methods.merge:Merge",
        arxiv=None,
        reference_url="https://huggingface.co/docs/diffusers/using-diffusers/merge_loras",
        capabilities=Capabilities(),
    ),
)

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}


def find_method(name: str) -> Method:
    """The row of a method. Raises RequestInvalid, with the names that exist, when there is none."""
    return find_row(METHODS, "composition", name)


def parse_parameters(method: str, parameters: Mapping[str, Any]) -> ComposeOptions:
    """Validate `parameters` against the options of `method`.

    Raises:
        RequestInvalid: unknown method or parameter, or a value out of range; each finding with its JSON pointer.
    """
    return parse_options(find_method(method).options, "compose", "composition", method, parameters)
