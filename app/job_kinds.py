"""What can be submitted: job kind → how its parameters are checked. One table for every road that makes a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from pydantic import BaseModel
from sqlalchemy.orm import Session

from app import capacity
from app.compose_inputs import check_compare, check_compose
from app.conversion_inputs import check_convert
from app.import_inputs import check_import
from app.load_check_inputs import check_load
from app.merge_inputs import check_merge, check_merges
from app.push_inputs import check_push
from app.quantize_inputs import check_quantize
from app.request_parts import parse_part
from app.schemas.common import as_json
from app.schemas.compose import CompareParams, ComposeParams
from app.schemas.conversion import ConvertParams
from app.schemas.imports import ImportParams
from app.schemas.load_checks import LONGEST_SECONDS, LoadCheckParams
from app.schemas.merge import CompareMergesParams, MergeParams
from app.schemas.pushes import PushParams
from app.schemas.quantize import QuantizeParams
from app.schemas.resources import Resources
from app.schemas.train import TrainParams
from app.schemas.transfer import TransferParams
from app.settings import Settings
from app.train_inputs import check_train
from app.transfer_inputs import TransferPlan, plan_transfer
from artifacts.errors import FieldError, RequestInvalid
from artifacts.pointers import pointers_below


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that can be made: what `app.job_making.make_job` takes.

    Attributes:
        affinity: id of the base model that it loads.
        sealed: confidential inputs, which only the job's worker reads (`storage.sealed_inputs`).
    """

    kind: str
    params: dict[str, Any]
    resources: dict[str, Any]
    affinity: str | None = None
    transfer: TransferPlan | None = None
    sealed: Mapping[str, Any] | None = None

    @classmethod
    def of_transfer(cls, plan: TransferPlan, resources: dict[str, Any]) -> Self:
        """The job of a transfer."""
        return cls("transfer", as_json(plan.params), resources, plan.affinity, plan, plan.sealed)


@dataclass(frozen=True, slots=True)
class JobKind:
    """How the parameters of a kind look, and the function that checks them against what is stored.

    The function is given the number of devices, and gives the affinity; of a transfer all that is planned.

    Attributes:
        confidential: which part of the parameters (a JSON pointer) goes with confidential inputs, if one does: only the
            kind's own call takes them.
        timeout_seconds: longest run of one attempt where none is asked for; None: any.
    """

    params: type[BaseModel]
    check: Callable[[Settings, Session, Any, int], str | TransferPlan | None]
    confidential: Callable[[Any], str | None] = lambda _: None
    timeout_seconds: float | None = None


def check_submission(
    settings: Settings,
    session: Session,
    kind: str,
    params: Mapping[str, Any],
    resources: Mapping[str, Any],
    *,
    sealed: bool = False,
) -> Submission:
    """Check that a job can be run.

    Args:
        sealed: whether its confidential inputs are there.

    Raises:
        RequestInvalid and its kin: an unknown kind (pointer `/kind`), parameters that its kind does not take or that
            name what is not there (`/params/…`), devices that do not exist (`/resources/…`).
    """
    found = JOB_KINDS.get(kind)
    if found is None:
        known = ", ".join(JOB_KINDS)
        raise RequestInvalid(
            f"there is no job kind {kind[:40]!r}", errors=[FieldError("/kind", f"must be one of: {known}")]
        )
    asked = as_json(parse_part(Resources, resources, "/resources"), exclude_none=True)
    if found.timeout_seconds is not None:
        asked.setdefault("timeout_seconds", found.timeout_seconds)
    capacity.check_devices(session, settings, kind, asked)
    request = parse_part(found.params, params, "/params")
    confidential = found.confidential(request)
    if confidential is not None and not sealed:
        problem = f"goes with confidential inputs, which only POST /{kind} takes"
        raise RequestInvalid(
            f"{confidential} {problem}.",
            hint="They are kept with one job, never with a schedule.",
            errors=[FieldError(f"/params{confidential}", problem)],
        )
    with pointers_below("/params"):
        checked = found.check(settings, session, request, int(asked.get("devices", 1)))
    if isinstance(checked, TransferPlan):
        return Submission.of_transfer(checked, asked)
    return Submission(kind, as_json(request), asked, checked)


def _check_transfer(settings: Settings, session: Session, request: TransferParams, devices: int) -> TransferPlan:
    return plan_transfer(settings, session, request, devices=devices)


JOB_KINDS: Mapping[str, JobKind] = MappingProxyType(
    {
        "merge": JobKind(MergeParams, check_merge),
        "merge_compare": JobKind(CompareMergesParams, check_merges),
        "convert": JobKind(ConvertParams, check_convert),
        "import": JobKind(ImportParams, check_import),
        "push": JobKind(PushParams, check_push),
        # a library matches the expressions of a foreign configuration, which may take for ever
        "load_check": JobKind(LoadCheckParams, check_load, timeout_seconds=LONGEST_SECONDS),
        "compose": JobKind(ComposeParams, check_compose),
        "compare": JobKind(CompareParams, check_compare),
        "quantize": JobKind(QuantizeParams, check_quantize),
        "train": JobKind(TrainParams, check_train, lambda it: None if it.transferable is None else "/transferable"),
        "transfer": JobKind(TransferParams, _check_transfer),
    }
)
