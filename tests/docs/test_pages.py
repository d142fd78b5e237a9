"""What the pages promise: links lead somewhere, commands exist, the README says first what matters first."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def _text(root: Path, name: str) -> str:
    return (root / name).read_text(encoding="utf-8")


def _targets(root: Path) -> set[str]:
    return set(re.findall(r"^([a-z-]+):", _text(root, "Makefile"), re.MULTILINE))


def test_readme_begins_with_the_two_commands(root: Path) -> None:
    commands = re.findall(r"^make ([a-z-]+)", _text(root, "README.md"), re.MULTILINE)
    assert commands[:2] == ["demo", "test"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/tutorial.md"])
def test_every_make_target_that_is_named_exists(root: Path, name: str) -> None:
    named = set(re.findall(r"(?:^|`|&& )make ([a-z-]+)", _text(root, name), re.MULTILINE))
    assert named
    assert named <= _targets(root)


def test_the_makefile_has_what_developers_expect(root: Path) -> None:
    assert {"setup", "demo", "serve", "test", "test-all", "check", "bench", "docs"} <= _targets(root)


def test_make_knows_its_targets(root: Path) -> None:
    """A dry run of each target parses the Makefile and needs no environment."""
    for target in ("demo", "serve", "test", "test-all", "check", "bench", "docs"):
        done = subprocess.run(
            ["make", "--dry-run", target, "VENV=/nonexistent"], cwd=root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "pip" in done.stdout, f"{target} does not set up what it needs"


@pytest.mark.parametrize("name", PAGES)
def test_links_of_the_top_pages_lead_somewhere(root: Path, name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", _text(root, name)):
        assert target.startswith("https://") or (root / target).exists(), f"{name} links to {target}"


def test_links_between_pages_lead_somewhere(root: Path, pages: dict[str, str]) -> None:
    for name, text in pages.items():
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not target.startswith(("https://", "http://")):
                assert (root / "docs" / name).parent.joinpath(target).is_file(), f"docs/{name} links to {target}"


def test_no_text_has_the_markers_of_an_unfinished_merge(root: Path) -> None:
    """Of every tracked file; in a copy without a repository, of what lies below it but for hidden folders."""
    markers = "^(<{7}|={7}|>{7}|[|]{7})( |$)"
    command = ["git", "grep", "--line-number", "-I", "--extended-regexp", markers]
    if not (root / ".git").exists():
        command[2:2] = ["--no-index", "--exclude-standard"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stdout + done.stderr  # 1: nothing was found


def test_every_page_is_in_the_navigation(root: Path, pages: dict[str, str]) -> None:
    navigation = _text(root, "mkdocs.yml").partition("\nnav:")[2]
    assert not [name for name in pages if name not in navigation]


def test_examples_in_the_pages_are_json(pages: dict[str, str]) -> None:
    blocks = [block for text in pages.values() for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert blocks
    for block in blocks:
        json.loads(block)


def test_parameters_in_the_examples_are_accepted(root: Path, pages: dict[str, str]) -> None:
    """Each body of POST /merge and its kin that a page or the README shows is one that the service takes."""
    from app.schemas.merge import CompareMergesRequest, MergeRequest
    from app.schemas.train import TrainRequest
    from app.schemas.uploads import UploadRequest
    from merge.catalog import SEARCH, parse_parameters
    from merge.search_space import SearchSpace

    texts = [*pages.values(), _text(root, "README.md")]
    bodies = [body for text in texts for body in re.findall(r"-d '(\{.*?\})'", text, re.DOTALL)]
    assert len(bodies) >= 2
    for number, body in enumerate(bodies):
        counted = iter(range(1000))
        filled = re.sub(r"(adp|dat)_…", lambda found, c=counted: f"{found[1]}_{next(c):032x}", body)  # type: ignore[misc]
        if '"candidates"' in filled:
            compared = CompareMergesRequest.model_validate_json(filled)
            for candidate in compared.candidates:
                parse_parameters(candidate.method, candidate.parameters)
            continue
        if '"transferable"' in filled:
            TrainRequest.model_validate_json(filled)
            continue
        if '"length"' in filled:
            UploadRequest.model_validate_json(filled.replace('"…"', f'"{"0" * 64}"'))
            continue
        request = MergeRequest.model_validate_json(filled)
        if request.method == SEARCH.name:
            SearchSpace.of(SEARCH.options.model_validate(request.parameters), [1.0] * len(request.adapters))
            assert request.evaluation is not None
            continue
        parse_parameters(request.method, request.parameters)
        assert request.adapters, f"body {number}"


def test_the_changelog_has_the_version_of_the_project(root: Path) -> None:
    version = tomllib.loads(_text(root, "pyproject.toml"))["project"]["version"]
    assert f"## [{version}]" in _text(root, "CHANGELOG.md")


def test_the_compose_file_sets_what_the_service_reads(root: Path) -> None:
    services = yaml.safe_load(_text(root, "compose.yaml"))["services"]
    environment = services["rankwise"]["environment"]
    assert environment["RANKWISE_DATABASE_URL"].startswith("postgresql+psycopg://")
    assert environment["RANKWISE_BLOB_URL"].startswith("s3://")
    assert environment["RANKWISE_API_KEYS"] == "on"
    asked = set(re.findall(r"\$\{([A-Z0-9_]+):\?", _text(root, "compose.yaml")))
    given = set(re.findall(r"^([A-Z0-9_]+)=", _text(root, ".env.example"), re.MULTILINE))
    assert asked <= given
    for name, service in services.items():
        assert ":" in service["image"], f"{name} has no version"
        assert not service["image"].endswith(":latest")


def test_the_image_runs_the_torch_of_the_lock(root: Path) -> None:
    (torch,) = re.findall(r"^torch==(\S+)", _text(root, "requirements.lock"), re.MULTILINE)
    assert f'"torch=={torch}"' in _text(root, "pyproject.toml")
    assert f"torch=={torch}" in _text(root, "docs/how-to/deploy.md")
