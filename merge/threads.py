"""Modules side by side: how a merge uses the cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def module_threads() -> Iterator[ThreadPoolExecutor]:
    """A thread per core, each with single-threaded kernels: modules are independent, and most of them are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(max_workers=min(before, os.cpu_count() or 1), thread_name_prefix="merge")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
