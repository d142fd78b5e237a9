"""Work that can not be interrupted, such as a call to another server, with an eye on the clock and on the job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from artifacts.errors import RequestInvalid

T = TypeVar("T")
WATCH_SECONDS = 0.2


def watched(work: Callable[[], T], seconds: float, check_stop: Callable[[], None], what: str) -> T:
    """What `work` returns, done in a thread that nobody waits for once the job is to stop or its time is over.

    That thread ends with the process, or at the next report of `work` on an attempt that is over by then.

    Args:
        check_stop: raises when the job is to stop.
        what: becomes of an adapter by this work, as "sent".

    Raises:
        RequestInvalid: it took longer than `seconds`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"adapter {what}", daemon=True)
    ends = time.monotonic() + seconds
    thread.start()
    while thread.is_alive():
        thread.join(max(0.0, min(WATCH_SECONDS, ends - time.monotonic())))
        check_stop()
        if thread.is_alive() and time.monotonic() >= ends:
            raise out_of_time(what, seconds)
    if errors:
        raise errors[0]
    return results[0]


def out_of_time(what: str, seconds: float) -> RequestInvalid:
    """What to say of an adapter that could not be fetched or sent in the time that there is for one."""
    return RequestInvalid(
        f"The adapter could not be {what} within {seconds:g} s.",
        hint="Whoever runs the service can set RANKWISE_IMPORT_TIMEOUT_SECONDS.",
    )
