"""Kinds of jobs for the contract of the providers. They run in real worker processes."""

from __future__ import annotations

import os

from workers.context import JobContext, JobOutcome


def warms(context: JobContext) -> JobOutcome:
    """Leaves two base models in the memory of its process: single layers, which take no time to load."""
    from torch.nn import Linear

    for model in ("mdl_a", "mdl_b"):
        context._warm.get((model, "auto", "cpu"), 1000, 8, lambda: Linear(1, 1))
    return JobOutcome()


def count_ranks(context: JobContext) -> JobOutcome:
    """Every rank tells its process group."""
    from torch import distributed

    groups: list[int | None] = [None] * context.world_size
    distributed.all_gather_object(groups, os.getpgid(0))
    return JobOutcome(report={"ranks": distributed.get_world_size(), "groups": groups})
