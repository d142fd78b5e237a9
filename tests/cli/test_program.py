"""The program as a whole: words, what it loads, exit codes, what an error looks like."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("serve", "worker", "demo", "adapters", "merge", "jobs", "models", "methods", "keys", "db", "config")
HELP_MODULES = 500
UNREACHABLE = "http://127.0.0.1:9"


def test_help_names_every_command(cli: Callable[..., Any]) -> None:
    result = cli("--help")
    assert result.code == 0
    for word in WORDS:
        assert f" {word} " in result.out


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ("adapters", ("add", "list", "get", "download", "cut", "delete", "lineage")),
        ("jobs", ("list", "get", "watch", "attempts", "logs", "cancel", "retry")),
        ("models", ("add", "list", "get", "deprecate")),
        ("keys", ("create", "list", "revoke")),
        ("db", ("upgrade", "current", "sweep")),
        ("config", ("show",)),
    ],
)
def test_help_of_a_group_names_its_commands(cli: Callable[..., Any], group: str, words: tuple[str, ...]) -> None:
    result = cli(group, "--help")
    assert result.code == 0
    for word in words:
        assert f" {word} " in result.out


def test_help_loads_little_and_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "before = len(sys.modules)\n"
        "from app.cli import run\n"
        "code = run(['--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'fastapi', 'sqlalchemy', 'httpx'} & set(sys.modules)\n"
        "print(len(sys.modules) - before, file=sys.stderr)\n"
        "sys.exit(f'loaded {heavy}' if heavy else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Each costs about a millisecond of every command.
    assert int(done.stderr.splitlines()[-1]) < HELP_MODULES


def test_version(cli: Callable[..., Any]) -> None:
    from importlib.metadata import version

    assert cli("--version").out == f"rankwise {version('rankwise')}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("adapters", "get"),
        ("adapters", "list", "--limit", "0"),
        ("merge", "a", "b", "--set", "no-equals-sign", "-o", "out"),
        ("merge", "a", "b", "--weight", "a=heavy", "-o", "out"),
        ("merge", "a", "b", "--weight", "a=nan", "-o", "out"),
        ("merge", "a", "b", "--weight", "c=1", "-o", "out"),
        ("merge", "a", "b", "--weight", "a=1", "--weight", "a=2", "-o", "out"),
        ("merge", "a", "b", "--rank", "4", "--set", "rank=4", "-o", "out"),
        ("merge", "a", "b"),
        ("merge", "adp_1", "b", "-o", "out"),
    ],
)
def test_wrong_usage_ends_with_2(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "Error" in result.err or "Usage" in result.err


def test_a_service_that_is_not_there(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_SERVER", UNREACHABLE)
    result = cli("jobs", "list")
    assert result.code == 1
    assert result.out == ""
    assert UNREACHABLE in result.err
    assert "rankwise serve" in result.err


def test_errors_are_json_too_when_asked(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_SERVER", UNREACHABLE)
    result = cli("jobs", "list", "--json")
    assert result.code == 1
    assert json.loads(result.out)["code"] == "unreachable"
    assert cli("jobs", "list").out == "", "--json of one run must not stick to the next"


def test_the_server_option_beats_the_environment(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKWISE_SERVER", "http://127.0.0.1:10")
    assert UNREACHABLE in cli("--server", UNREACHABLE, "jobs", "list").err


def test_an_address_that_is_none(cli: Callable[..., Any]) -> None:
    result = cli("--server", "ftp://127.0.0.1", "jobs", "list")
    assert result.code == 1
    assert "ftp://127.0.0.1" in result.err


def test_a_closed_pipe_is_no_error() -> None:
    """`rankwise … | head -1`: the reader leaves early."""
    script = "import sys; from app.cli import run; sys.exit(run(['--help']))"
    child = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    errors = child.stderr.read()
    child.wait()
    child.stderr.close()
    assert "Traceback" not in errors
