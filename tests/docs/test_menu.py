"""Every entry of the menu of merge methods is whole: implementation, oracle tests, page, place in the navigation."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from merge.catalog import METHODS

NAMES = sorted(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_an_implementation_in_the_file_of_its_family(name: str) -> None:
    row = METHODS[name]
    assert row.implementation in {f"merge.methods.{name}:merge", f"merge.methods.{row.family}:{name}"}
    function = row.load()
    assert callable(function)
    assert inspect.getdoc(function), f"{row.implementation} has no docstring"


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_oracle_tests(root: Path, name: str) -> None:
    source = root / "tests" / "merge" / f"test_{METHODS[name].family}.py"
    assert source.is_file(), f"write the oracles of {name!r} into {source.relative_to(root)}"
    assert "def test_" in source.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_has_a_page_with_all_its_parameters(root: Path, pages: dict[str, str], name: str) -> None:
    page = f"reference/methods/{METHODS[name].family}.md"
    source = root / "docs" / page
    assert source.is_file(), f"write docs/{page}"
    text = source.read_text(encoding="utf-8")
    assert f"<!-- generate: method {name} -->" in text
    assert "## When to use it" in text
    for field, info in METHODS[name].options.model_fields.items():
        assert f"| `{field}` |" in pages[page]
        assert info.description, f"{name}.{field} has no description"
    assert page in (root / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_in_the_overview(pages: dict[str, str], name: str) -> None:
    page, _, anchor = METHODS[name].page.partition("#")
    assert f"[`{name}`]({METHODS[name].page})" in pages["reference/methods/index.md"]
    if anchor:
        assert f"{{ #{anchor} }}" in pages[f"reference/methods/{page}"]


def test_no_page_outlives_its_method(root: Path) -> None:
    written = {path.stem for path in (root / "docs" / "reference" / "methods").glob("*.md")} - {"index"}
    assert written == {row.family for row in METHODS.values()}


def test_no_implementation_is_off_the_menu(root: Path) -> None:
    files = {path.stem for path in (root / "merge" / "methods").glob("*.py")} - {"__init__"}
    assert files == {row.family for row in METHODS.values()}
    assert len({row.implementation for row in METHODS.values()}) == len(METHODS)
