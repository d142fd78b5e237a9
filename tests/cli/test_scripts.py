"""The checks of `make check` that are our own: each must find what it is there to find."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sizes, dockerfile, dependencies = load("check_sizes"), load("check_dockerfile"), load("list_dependencies")
GOOD = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IGNORE = [
    line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")
]


def test_the_dockerfile_is_clean() -> None:
    assert dockerfile.findings(GOOD, IGNORE) == []


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("python:3.11.14-slim-bookworm", "python:slim", "no pinned version"),
        ("USER 10001:10001\n", "", "runs as root"),
        ("USER 10001:10001", "USER root", "runs as root"),
        ("USER 10001:10001", "USER rankwise", "numeric USER"),
        ("HEALTHCHECK", "LABEL health=", "no HEALTHCHECK"),
        ("-c requirements.lock -r", "-r", "without the lock"),
        ('CMD ["serve"]', "CMD serve", "shell form"),
        ("COPY pyproject.toml requirements.lock ./", "COPY pyproject.toml nothing.lock ./", "does not have"),
        ("COPY pyproject.toml requirements.lock ./", "COPY pyproject.toml Makefile ./", ".dockerignore keeps out"),
        ("COPY . .", "ADD . .", "use COPY"),
        ("RUN python -m venv /opt/venv", "RUN apt-get update", "base image"),
    ],
)
def test_the_dockerfile_check_finds(old: str, new: str, finding: str) -> None:
    assert old in GOOD
    assert any(finding in message for message in dockerfile.findings(GOOD.replace(old, new), IGNORE))


def test_the_size_check_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "ROOT", tmp_path)
    long = tmp_path / "long.py"
    long.write_text("def f():\n" + "    x = 1\n" * 30, encoding="utf-8")
    assert sizes.findings(long, 100, 40) == []
    assert sizes.findings(long, 30, 40) == ["long.py:1: 31 lines, at most 30"]
    assert sizes.findings(long, 100, 30) == ["long.py:1: f() has 31 lines, at most 30"]
    nameless = tmp_path / "utils.py"
    nameless.write_text("", encoding="utf-8")
    assert len(sizes.findings(nameless, 100, 40)) == 1


def test_dependencies_are_those_of_the_project() -> None:
    project = ROOT / "pyproject.toml"
    plain = dependencies.dependencies(project, [])
    assert any(line.startswith("fastapi") for line in plain)
    assert not any(line.startswith("pytest") for line in plain)
    assert any(line.startswith("boto3") for line in dependencies.dependencies(project, ["s3"]))
    with pytest.raises(SystemExit, match="unknown extras"):
        dependencies.dependencies(project, ["nope"])


def test_ci_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_the_table_of_mutants() -> None:
    mutants = load("mutants")
    found = {"merge.cat.x_merge__mutmut_1": 1, "merge.cat.x_merge__mutmut_2": 0, "merge.svd.x_f__mutmut_1": 33}
    found |= {"merge.svd.x_f__mutmut_2": -24, "merge.svd.x_f__mutmut_3": None}
    found |= {"merge.svd.x_f__mutmut_4": 5, "merge.svd.x_f__mutmut_5": 2, "merge.svd.x_f__mutmut_6": 34}
    lines = [line.split() for line in mutants.table(found, found).splitlines()]
    assert lines[1:4] == [
        ["merge.cat", "1", "0", "2", "50.0%"],
        ["merge.svd", "1", "1", "3", "33.3%"],
        ["merge,", "all", "2", "1", "5", "40.0%"],
    ]
    # 85 of 100, as the textbook has it
    assert mutants.interval(85, 100) == pytest.approx((0.7672, 0.9069), abs=1e-4)
