"""A scripted client walks the whole OpenAPI document: no 5xx, no undocumented status, no schema violated."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.main import create_app
from app.settings import Settings

CONFIG = Path(__file__).with_name("schemathesis.toml")
SEED = "20240916"


def run_schemathesis(
    server: tuple[str, str | None], folder: Path, *options: str, timeout: float
) -> tuple[subprocess.CompletedProcess[str], int]:
    """The finished run, and how many cases it sent."""
    url, secret = server
    config = folder / CONFIG.name
    # With a key among the headers, schemathesis counts a header that no API knows as invalid data that was accepted.
    config.write_text(CONFIG.read_text() + ("\n[generation]\nallow-extra-parameters = false\n" if secret else ""))
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)]
    command += ["run", f"{url}/openapi.json", "--checks", "all", "--seed", SEED, "--no-shrink"]
    command += ["--request-timeout", "30", "--warnings", "off", *options]
    if secret:
        command += ["-H", f"Authorization: Bearer {secret}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    generated = re.search(r"(\d+) generated", result.stdout)
    return result, int(generated.group(1)) if generated else 0


def check_walked(output: str) -> None:
    """Every call of the document was selected and tested."""
    counts = re.search(r"Selected: (\d+)/(\d+)\s+Tested: (\d+)", output)
    assert counts is not None, output[-2000:]
    assert len(set(counts.groups())) == 1, f"not every call was walked: {counts[0]}"


@pytest.mark.parametrize("contract_server", ["keys"], indirect=True)
def test_a_few_cases_of_every_call(contract_server: tuple[str, str | None], tmp_path: Path) -> None:
    result, cases = run_schemathesis(contract_server, tmp_path, "-n", "3", "--phases", "examples,fuzzing", timeout=240)
    assert result.returncode == 0, result.stdout[-20_000:]
    assert cases >= 60, result.stdout[-2000:]
    check_walked(result.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("contract_server", "phases"),
    [("open", "examples,coverage,fuzzing,stateful"), ("keys", "examples,fuzzing,stateful")],
    indirect=["contract_server"],
)
def test_two_thousand_cases_of_all_checks(
    contract_server: tuple[str, str | None], phases: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bounds of every parameter, tens of thousands of cases that know nothing of keys, are walked once."""
    options = ("--phases", phases, "-n", "40", "--continue-on-failure")
    result, cases = run_schemathesis(contract_server, tmp_path, *options, timeout=1500)
    with capsys.disabled():
        print(f"\n{phases}: {cases} cases")
    assert result.returncode == 0, result.stdout[-20_000:]
    assert cases >= 2000, result.stdout[-2000:]
    check_walked(result.stdout)


def test_the_document_is_valid_and_every_call_names_its_problems(tmp_path: Path) -> None:
    from openapi_spec_validator import validate

    document = create_app(Settings(data_dir=tmp_path, pool="off")).openapi()
    validate(json.loads(json.dumps(document)))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, response in operation["responses"].items():
                if status >= "400" and method != "head":
                    content = response["content"]
                    assert set(content) == {"application/problem+json"}, (path, method, status)


def test_request_bodies_refuse_unknown_fields(tmp_path: Path) -> None:
    document = create_app(Settings(data_dir=tmp_path, pool="off")).openapi()
    merges = ("MergeRequest", "MergeAdapter", "Resources", "LegoOptions", "SvdOptions")
    schedules = ("ScheduleRequest", "ScheduleTrigger", "ScheduledJob", "SchedulePatch")
    for name in (*merges, *schedules, "ModelRequest", "ModelPatch"):
        assert document["components"]["schemas"][name]["additionalProperties"] is False, name


@pytest.mark.parametrize("contract_server", ["open"], indirect=True)
def test_the_document_is_served(contract_server: tuple[str, str | None]) -> None:
    with httpx.Client(base_url=contract_server[0], trust_env=False) as client:
        assert client.get("/openapi.json").json()["openapi"].startswith("3.1")
        assert client.get("/docs").headers["content-type"].startswith("text/html")
