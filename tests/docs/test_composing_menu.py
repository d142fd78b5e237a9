"""Every composition method is whole: implementation, tests, parameters in the reference; examples are accepted."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from compose.catalog import METHODS

PAGE = "reference/composing.md"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_an_implementation_in_its_own_file(name: str) -> None:
    row = METHODS[name]
    assert row.implementation.startswith(f"compose.methods.{name}:")
    assert inspect.getdoc(row.load())


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_in_the_reference_with_all_its_parameters(pages: dict[str, str], name: str) -> None:
    section = pages[PAGE].split(f"{{ #{name} }}")[1].split("\n## ")[0]
    for field in METHODS[name].options.model_fields:
        assert f"| `{field}` |" in section
    assert METHODS[name].when in section


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_oracle_tests(root: Path, name: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (root / "tests" / "compose").glob("test_*.py")]
    assert any(f'"{name}"' in text for text in sources), f"no test of compose names {name!r}"


def test_bodies_in_the_how_to_are_accepted(pages: dict[str, str]) -> None:
    from app.compose_inputs import validate
    from app.schemas.compose import CompareRequest, ComposeRequest

    bodies = re.findall(r"/compose-image(/compare)?[^\n]*--json '(\{.*?\})'", pages["how-to/compose.md"], re.DOTALL)
    assert {compared for compared, _ in bodies} == {"", "/compare"}
    for compared, body in bodies:
        counted = iter(range(1000))
        filled = re.sub(r"adp_…", lambda _, c=counted: f"adp_{next(c):032x}", body)  # type: ignore[misc]
        if compared:
            request = CompareRequest.model_validate_json(filled)
            for item in request.methods:
                validate(request.scene(item.method, item.parameters))
        else:
            single = ComposeRequest.model_validate_json(filled)
            validate(single.scene(single.method, single.parameters))
