"""Waiting for what another thread or process does, without sleeping longer than that takes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

PAUSE = 0.02


def wait_for(
    condition: Callable[[], Any], what: str = "what is waited for", seconds: float = 90.0, *, pause: float = PAUSE
) -> Any:
    """The first true value of `condition`; fails when there is none within `seconds`."""
    deadline, waiting = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        waiting.wait(pause)
    return value
