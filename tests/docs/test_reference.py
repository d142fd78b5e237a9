"""The reference is complete: every setting, command, error code and call is on its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from app.settings import Settings
from artifacts.errors import RankwiseError


def test_every_setting_is_explained(pages: dict[str, str]) -> None:
    page = pages["reference/settings.md"]
    undocumented = [name for name in Settings.model_fields if f"`RANKWISE_{name.upper()}`" not in page]
    assert not undocumented


def test_every_variable_that_is_named_in_the_docs_exists(root: Path, pages: dict[str, str]) -> None:
    known = {f"RANKWISE_{name.upper()}" for name in Settings.model_fields}
    known |= {"RANKWISE_SERVER", "RANKWISE_API_KEY", "RANKWISE_MODEL_CACHE"}
    texts = [*pages.values(), (root / "README.md").read_text(encoding="utf-8")]
    texts += [(root / name).read_text(encoding="utf-8") for name in ("Dockerfile", "compose.yaml", "CONTRIBUTING.md")]
    named = {name for text in texts for name in re.findall(r"RANKWISE_[A-Z_]*[A-Z]", text)}
    assert named <= known


def _codes(cls: type[RankwiseError]) -> Iterator[str]:
    if cls.__module__ in {"artifacts.errors", "app.problems"}:
        yield cls.code
    for child in cls.__subclasses__():
        yield from _codes(child)


def test_every_error_code_is_explained(pages: dict[str, str]) -> None:
    import app.problems  # noqa: F401 (its classes belong to the tree)

    page = pages["reference/errors.md"]
    for code in _codes(RankwiseError):
        assert f'<span id="{code}"></span>`{code}`' in page


def test_every_code_that_only_a_job_can_have_is_explained(root: Path, pages: dict[str, str]) -> None:
    source = (root / "workers" / "failures.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'_error\(\s*"([a-z_]+)"', source))
    assert "worker_crashed" in codes
    missing = [code for code in codes if f"`{code}`" not in pages["reference/errors.md"]]
    assert not missing


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{path} {name}")


def test_every_command_and_option_is_on_its_page(generate: ModuleType, pages: dict[str, str]) -> None:
    from typer.main import get_command

    from app.cli.program import app

    page = pages["reference/cli.md"]
    sections = dict(re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for path, command in _commands(get_command(app), "rankwise"):
        assert command.help, f"{path} has no help"
        if getattr(command, "commands", None) and path != "rankwise":
            continue
        for parameter in command.params:
            assert getattr(parameter, "help", None) or parameter.name == "help", f"{path}: {parameter.name} has no help"
            if parameter.param_type_name == "option":
                assert f"`{parameter.opts[0]}`" in sections[path]


def test_every_command_that_is_named_in_the_docs_exists(root: Path, pages: dict[str, str]) -> None:
    from typer.main import get_command

    from app.cli.program import app

    known = {path for path, _ in _commands(get_command(app), "rankwise")}
    groups = {path for path, command in _commands(get_command(app), "rankwise") if getattr(command, "commands", None)}
    texts = {**pages, "README.md": (root / "README.md").read_text(encoding="utf-8")}
    for name, text in texts.items():
        for words in re.findall(r"(?:^|`|exec rankwise |\$\(|bin/)(rankwise(?: [a-z]+)+)", text, re.MULTILINE):
            parts = words.split()
            group = " ".join(parts[:2])
            named = " ".join(parts[:3]) if group in groups else group
            assert named in known, f"{name} names the command {named!r}"


def test_every_call_is_listed(pages: dict[str, str], tmp_path: Path) -> None:
    from app.main import create_app

    page = pages["reference/http.md"]
    for path, operations in create_app(Settings(data_dir=tmp_path)).openapi()["paths"].items():
        for verb in operations:
            assert f"`{verb.upper()} {path}`" in page


def test_a_marker_that_names_nothing_fails(generate: ModuleType) -> None:
    with pytest.raises(KeyError):
        generate.fill("<!-- generate: nonsense -->")


def test_no_marker_is_left(pages: dict[str, str]) -> None:
    assert not [name for name, text in pages.items() if "<!-- generate" in text]


def test_cells_can_not_break_the_table(generate: ModuleType) -> None:
    assert generate.table(["a"], [["x|y\nz"]]).splitlines()[-1] == r"| x\|y z |"
