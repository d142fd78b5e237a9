"""The commands of the README and of the tutorial, run as they are written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from app.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
SERVER = "http://127.0.0.1:8000"
NEEDS_CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which the examples are where the pages say, and what the commands write stays apart."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def shell(script: str, folder: Path, service: ServerProcess) -> str:
    """Run a script of bash with the program on its PATH and the service in place of the default one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace(SERVER, service.url)],
        cwd=folder,
        env={**os.environ, "RANKWISE_SERVER": service.url, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def blocks(text: str) -> list[str]:
    """The bash blocks of a page, in order, without the indentation of a tab."""
    found = re.findall(r"^([ ]*)```bash\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


@NEEDS_CURL
def test_the_minute_with_curl(checkout: Path, service: ServerProcess) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## One minute with curl")[2].partition("\n## ")[0]
    start, upload, merge, download = blocks(section)[0].split("\n\n")
    assert "rankwise serve" in start
    answers = shell(upload, checkout, service)
    decoder, ids = json.JSONDecoder(), []
    while answers.strip():
        adapter, end = decoder.raw_decode(answers.strip())
        ids.append(adapter["id"])
        answers = answers.strip()[end:]
    assert len(ids) == 2
    given = iter(ids)
    job = json.loads(shell(re.sub("adp_…", lambda _: next(given), merge), checkout, service))
    assert job["state"] == "succeeded"
    assert job["result"]["report"]["rank"] == 16
    shell(download.replace("adp_…", job["result"]["adapters"][0]), checkout, service)
    (archive,) = checkout.glob("*.zip")
    with zipfile.ZipFile(archive) as packed:
        assert any(name.endswith("adapter_model.safetensors") for name in packed.namelist())


@NEEDS_CURL
def test_the_tutorial(checkout: Path, service: ServerProcess) -> None:
    """From upload to the merge of files; the steps before and after need a terminal and a base model."""
    commands = blocks((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    start, *steps = commands
    assert "rankwise serve" in start
    shell("\n".join(steps), checkout, service)
    (merged,) = (checkout / "merged").iterdir()
    assert (merged / "adapter_model.safetensors").is_file()
    assert (checkout / "merged-svd" / "merge_report.json").is_file()


def test_the_merges_of_files(checkout: Path, service: ServerProcess) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^rankwise merge examples.*$", readme, re.MULTILINE)
    shell(line, checkout, service)
    assert json.loads((checkout / "merged" / "merge_report.json").read_text(encoding="utf-8"))["rank"] == 16
