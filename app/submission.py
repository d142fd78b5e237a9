"""How a call that makes a job answers: checked, created with its idempotency key, and told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from app.auth import Principal
from app.idempotency import Answer, answer_once, request_key
from app.job_answers import accepted
from app.job_kinds import check_submission
from app.job_making import make_job
from app.schemas.common import as_json
from app.schemas.resources import Resources
from app.state import Services
from artifacts.pointers import pointers_below


def submit(
    services: Services,
    principal: Principal,
    kind: str,
    params: dict[str, Any],
    resources: Resources | None,
    *,
    idempotency_key: str | None,
    request_id: str,
    subject: Callable[[Session], object] | None = None,
    sealed: dict[str, Any] | None = None,
) -> Answer:
    """Check a job of `kind` and create it, together with its first event and its idempotency key.

    Args:
        subject: reads what the path of the call names: if it is not there, the answer is 404, whatever the body says.
        sealed: confidential inputs, which only the job's worker reads (`storage.sealed_inputs`).

    Raises:
        RequestInvalid and its kin: see app.job_kinds.check_submission; their pointers are those of the body.
        QueueFull, QuotaExceeded
    """
    if subject is not None:
        with services.database.read() as session:
            subject(session)
    wishes: dict[str, Any] = {} if resources is None else as_json(resources, exclude_none=True)

    def act(session: Session) -> Answer:
        with pointers_below("", instead_of="/params"):
            wanted = check_submission(services.settings, session, kind, params, wishes, sealed=sealed is not None)
        if sealed is not None:
            wanted = replace(wanted, sealed=sealed)
        job, _ = make_job(services.settings, session, wanted, created_by=principal.key_id, request_id=request_id)
        return accepted(session, job)

    # Of all of it only a digest is kept.
    payload = {**params, "resources": wishes} | ({} if sealed is None else {"sealed": sealed})
    answer = answer_once(services, request_key(principal.owner, idempotency_key, f"POST /{kind}", payload), act)
    if not answer.replayed:
        services.job_made(kind)
    return answer


async def submitted(
    request: Request,
    services: Services,
    principal: Principal,
    kind: str,
    params: dict[str, Any],
    resources: Resources | None,
    idempotency_key: str | None,
    *,
    subject: Callable[[Session], object] | None = None,
    sealed: dict[str, Any] | None = None,
) -> Answer:
    """`submit` for the call of a request, beside the loop that serves others. Raises what it does."""
    return await run_in_threadpool(
        submit,
        services,
        principal,
        kind,
        params,
        resources,
        idempotency_key=idempotency_key,
        request_id=request.state.request_id,
        subject=subject,
        sealed=sealed,
    )
