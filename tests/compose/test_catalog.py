"""The menu: every row has what it names, and nothing of it imports torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from artifacts.errors import RequestInvalid
from compose.catalog import METHODS, find_method, parse_parameters


@pytest.mark.parametrize("name", list(METHODS))
def test_every_row_has_an_implementation_and_described_options(name: str) -> None:
    from compose.fused_adapter import FusionMethod
    from compose.protocol import CompositionMethod

    row = METHODS[name]
    assert row.name == name
    assert all(part.strip().endswith(".") for part in (row.summary, row.when, row.cost))
    kind = CompositionMethod if row.capabilities.yields == "image" else FusionMethod
    assert issubclass(row.load(), kind)
    assert all(field.description for field in row.options.model_fields.values())
    row.options()


def test_unknown_names_and_values_are_refused_with_pointers() -> None:
    with pytest.raises(RequestInvalid, match="no composition method 'nonsense'"):
        find_method("nonsense")
    with pytest.raises(RequestInvalid) as refused:
        parse_parameters("merge", {"guidance_scale": 0.5, "tau": 1})
    assert {item.pointer for item in refused.value.errors} == {"/parameters/guidance_scale", "/parameters/tau"}


def test_the_menu_and_the_checks_import_no_torch() -> None:
    code = "import sys, compose.validation, compose.prompts, compose.composition; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
