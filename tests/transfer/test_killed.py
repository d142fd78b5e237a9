"""A transfer whose process is killed at moments of chance, again and again, ends with the bytes of one that was not."""

from __future__ import annotations

import os
import random
import select
import signal
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
from transfers import PARAMETERS, Pair, adapter_bytes

KILLS = 30
CHECKPOINTS = {"training": {**PARAMETERS["training"], "steps": 12, "checkpoint_steps": 2}}


def start(pair: Pair, folder: Path) -> tuple[int, int]:
    """A process that does the transfer: its id, and a pipe that ends with it."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The child of a process with threads: it only computes, and with one thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    code = 1
    try:
        pair.run(folder, **CHECKPOINTS)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def killed_after(child: int, pipe: int, seconds: float) -> bool:
    """Kill the process after so many seconds; whether it had not ended by itself."""
    ended, _, _ = select.select([pipe], [], [], seconds)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the transfer failed by itself"
    return False


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_transfer_that_is_killed_at_random_moments_ends_the_same(pair: Pair, tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    began = time.monotonic()
    whole: Any = pair.run(tmp_path / "whole", **CHECKPOINTS)
    duration = time.monotonic() - began
    draws = random.Random(7)
    kills = 0
    window = duration / 2
    for number in range(10 * KILLS):
        if kills >= KILLS:
            break
        folder, before = tmp_path / f"killed-{number}", kills
        while killed_after(*start(pair, folder), draws.uniform(0, window)):
            kills += 1
        # The machine may have become faster since the first transfer.
        window = window if kills > before else window / 2
        result = pair.run(folder, **CHECKPOINTS)
        assert adapter_bytes(result) == adapter_bytes(whole)
        assert result.report == whole.report
    assert kills >= KILLS
