"""Transfers of files with no service: the pipeline of a job, between folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))

SEEDS = [f"CANARY ship {number} mugs" for number in range(4)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two bases of equal shapes, an adapter of the first, seeds and a holdout."""
    from tiny_models import write_adapter, write_llama

    folder = tmp_path_factory.mktemp("files")
    write_adapter(write_llama(folder / "source"), folder / "adapter")
    write_llama(folder / "target", seed=5)
    (folder / "seeds.txt").write_text("\n".join(SEEDS))
    rows = [{"prompt": f"ship {number}", "completion": " s"} for number in range(20)]
    (folder / "holdout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def moved(files: Path, output: Path, *more: object) -> list[object]:
    return ["transfer", files / "adapter", "--from", files / "source", "--to", files / "target", "-o", output, *more]


def test_an_adapter_is_moved_here(files: Path, tmp_path: Path, cli: Any) -> None:
    from safetensors.torch import load_file

    found = cli(*moved(files, tmp_path / "out", "--method", "copy", "--json"))
    assert found.code == 0, found.err
    assert found.json["report"]["verdict"] == "hold"
    before, after = (load_file(path / "adapter_model.safetensors") for path in (files / "adapter", tmp_path / "out"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "out" / "transfer_report.json").read_text()) == found.json["report"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


def test_an_interrupted_transfer_goes_on(
    files: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.cli import local_transfer

    asked = [
        *("--method", "seeds-only", "--seeds", files / "seeds.txt", "--holdout", files / "holdout.jsonl", "--json"),
        *("--set", 'training={"steps": 2, "batch_size": 2}', "--set", "answer_tokens=4", "--set", "answer_stop=e"),
    ]
    stages: list[str] = []
    unit = local_transfer._Watcher.unit

    def stop(self: Any, stage: str, message: str) -> None:
        if stage == "evaluate":
            raise KeyboardInterrupt
        unit(self, stage, message)

    monkeypatch.setattr(local_transfer._Watcher, "unit", stop)
    assert cli(*moved(files, tmp_path / "out", *asked)).code == 130
    assert not (tmp_path / "out").exists()

    def watch(self: Any, stage: str, message: str) -> None:
        stages.append(stage)
        unit(self, stage, message)

    monkeypatch.setattr(local_transfer._Watcher, "unit", watch)
    found = cli(*moved(files, tmp_path / "out", *asked))
    assert found.code == 0, found.err
    assert set(stages) == {"evaluate"}, "what was done is not done again"
    assert found.json["report"]["gate"]["items"] == 20
    assert "CANARY" not in found.out + found.err
    assert "CANARY" not in (tmp_path / "out" / "transfer_report.json").read_text()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--method", "copy", "--no-wait"], "here and now"),
        (["--method", "copy", "--epsilon", "2"], "/gate/epsilon"),
        (["--method", "copy", "--holdout", "nowhere"], "no file"),
        (["--method", "nonsense"], "nonsense"),
        (["--method", "seeds-only"], "seeds"),
        (["--method", "trans-lora", "--seeds", "SEEDS"], "discriminator"),
    ],
)
def test_what_can_not_be_done_is_told(files: Path, tmp_path: Path, cli: Any, more: list[str], told: str) -> None:
    found = cli(
        *moved(files, tmp_path / "out", *(str(files / "seeds.txt") if item == "SEEDS" else item for item in more))
    )
    assert found.code != 0
    assert told in found.err
    assert not (tmp_path / "out").exists()
