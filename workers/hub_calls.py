"""What every call of a hub's client has in common: plain HTTP, and the status that a failure came with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def plain_transfers() -> Iterator[None]:
    """Git LFS over HTTP, which every hub speaks; the chunked protocol of one company's hub is not asked for. No
    progress bars: they are for a terminal and would fill logs."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars, tqdm

    disable_progress_bars()
    tqdm.monitor_interval = 0  # or it starts a thread that stays
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def answered_status(error: BaseException) -> int | None:
    """The HTTP status of the hub's answer that led to the error; None: there was no answer."""
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes(error))
    return next((status for status in found if isinstance(status, int)), None)
