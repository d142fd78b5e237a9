"""Every entry of the menu of transfer methods is whole: implementation in its own file, parameters in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transfer.catalog import METHODS, parse_parameters
from transfer.gate import GateSettings

PAGE = "reference/transfer.md"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_in_the_reference_with_all_its_parameters(pages: dict[str, str], name: str) -> None:
    section = pages[PAGE].split(f"{{ #{name} }}")[1].split("\n## ")[0]
    for field in METHODS[name].options.model_fields:
        assert f"| `{field}` |" in section


def test_the_gate_is_in_the_reference(pages: dict[str, str]) -> None:
    for field in GateSettings.model_fields:
        assert f"| `{field}` |" in pages[PAGE].split("\n## The gate")[1]


def test_no_implementation_is_off_the_menu(root: Path) -> None:
    files = {path.stem for path in (root / "transfer" / "methods").glob("*.py")} - {"__init__"}
    assert files == {name.replace("-", "_") for name in METHODS}


def test_bodies_in_the_how_to_are_accepted(pages: dict[str, str]) -> None:
    from app.schemas.transfer import DecisionRequest, TransferRequest

    bodies = re.findall(
        r"/transfer(s/job_…/decision)?[^\n]* --json '(\{.*?\})'", pages["how-to/transfer.md"], re.DOTALL
    )
    assert len(bodies) == 2
    for decision, body in bodies:
        filled = re.sub(r"(adp|dat)_…", rf"\1_{0:032x}", body)
        if decision:
            DecisionRequest.model_validate_json(filled)
        else:
            request = TransferRequest.model_validate_json(filled)
            parse_parameters(request.method, request.parameters)
