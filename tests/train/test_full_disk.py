"""Checkpoints on a disk that has no space for them."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from artifacts.errors import DiskFull
from train.checkpoints import disk_full_told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_does_not_fit_ends_the_training_and_names_its_step(trainings: Any, small_disk: Path) -> None:
    trainings.folder = small_disk
    with pytest.raises(DiskFull, match="The disk is full at the checkpoint of step 2") as caught:
        trainings.run(steps=4, checkpoint_steps=2)
    assert "newest checkpoint" in str(caught.value.hint)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        SafetensorError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space" }'),
    ],
)
def test_every_writer_s_word_for_a_full_disk_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(DiskFull, match="full at the test"), disk_full_told("at the test", tmp_path):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), RuntimeError("a bug"), KeyError("x")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), disk_full_told("at the test", tmp_path):
        raise error
