"""Kinds of jobs for the tests of multi-device jobs and warm models. They run in real worker processes."""

from __future__ import annotations

import os
import signal

from artifacts.errors import RequestInvalid
from workers.context import JobContext, JobOutcome


def all_reduce(context: JobContext) -> JobOutcome:
    """Every rank adds rank + 1; everybody ends with the same sum."""
    import torch
    from torch import distributed

    value = torch.tensor([float(context.rank + 1)], device=context.device)
    distributed.all_reduce(value)
    pids: list[int | None] = [None] * context.world_size
    distributed.all_gather_object(pids, os.getpid())
    groups: list[int | None] = [None] * context.world_size
    distributed.all_gather_object(groups, os.getpgid(0))
    print(f"rank {context.rank} of {context.world_size} has {value.item():g}", flush=True)
    context.progress(0.5, f"rank {context.rank} tells")
    report = {
        "sum": value.item(),
        "world_size": context.world_size,
        "backend": distributed.get_backend(),
        "pids": pids,
        "groups": groups,
        "scratch": str(context.scratch),
    }
    return JobOutcome(report=report)


def one_rank_is_refused(context: JobContext) -> JobOutcome:
    """Rank 1 finds the job's parameters wrong, while the others wait for it."""
    from torch import distributed

    if context.rank == 1:
        raise RequestInvalid("rank 1 does not like this", hint="Ask for something else.")
    distributed.barrier()
    return JobOutcome()


def leader_is_refused(context: JobContext) -> JobOutcome:
    from torch import distributed

    if context.rank == 0:
        raise RequestInvalid("rank 0 does not like this")
    distributed.barrier()
    return JobOutcome()


def one_rank_dies(context: JobContext) -> JobOutcome:
    """Rank 1 is killed in the first attempt, while the others wait for it."""
    from torch import distributed

    if context.rank == 1 and context.spec.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()
    return JobOutcome(report={"attempt": context.spec.attempt})


def ranks_wait(context: JobContext) -> JobOutcome:
    """All ranks tell their process, then wait until they are asked to stop."""
    from torch import distributed

    pids: list[int | None] = [None] * context.world_size
    distributed.all_gather_object(pids, os.getpid())
    context.progress(0.1, f"waiting in {' '.join(map(str, pids))}")
    while True:
        signal.sigtimedwait([signal.SIGUSR1], 0.01)
        context.check_cancelled()


def use_base_model(context: JobContext) -> JobOutcome:
    """Runs a base model once and reports whether the process had it already."""
    import torch

    before = context._warm.ids
    model = context.base_model(context.params["model"])
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]], device=context.device)).logits
    return JobOutcome(
        report={
            "warm_before": list(before),
            "pid": os.getpid(),
            "logits": logits.double().sum().item(),
            "training": model.training,
            "gradients": any(parameter.requires_grad for parameter in model.parameters()),
        }
    )
