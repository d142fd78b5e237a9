"""POST /transfer: one job for equal requests, and the texts of its seeds nowhere but where its worker reads them."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app import capacity
from app.auth import Principal
from app.idempotency import Answer, answer_once, request_key
from app.job_answers import accepted
from app.job_kinds import Submission
from app.job_making import make_job
from app.schemas.common import as_json
from app.schemas.transfer import TransferParams, TransferRequest
from app.state import Services
from app.transfer_inputs import plan_transfer

KIND = "transfer"


def submit_transfer(
    services: Services, principal: Principal, body: TransferRequest, *, idempotency_key: str | None, request_id: str
) -> Answer:
    """Check a transfer and create its job, with its first event, its record and its idempotency key.

    202 with the new job; 200 with the job that does the same, if there is one that has not failed.

    Raises:
        RequestInvalid, StateConflict: see `app.transfer_inputs.plan_transfer`; pointers are those of the body.
        QueueFull, QuotaExceeded
    """
    wishes: dict[str, Any] = {} if body.resources is None else as_json(body.resources, exclude_none=True)
    params = TransferParams.model_validate(as_json(body, exclude={"seeds", "resources"}))

    def act(session: Session) -> Answer:
        capacity.check_devices(session, services.settings, KIND, wishes)
        plan = plan_transfer(services.settings, session, params, body.seeds)
        wanted = Submission.of_transfer(plan, wishes)
        job, is_new = make_job(services.settings, session, wanted, created_by=principal.key_id, request_id=request_id)
        answer = accepted(session, job)
        return answer if is_new else Answer(200, answer.body, answer.headers)

    payload = as_json(body)  # of which only the digest is kept
    answer = answer_once(services, request_key(principal.owner, idempotency_key, f"POST /{KIND}", payload), act)
    if not answer.replayed and answer.status == 202:
        services.job_made(KIND)
    return answer
