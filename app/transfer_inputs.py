"""Whether a transfer can be done, from what the database knows of the adapter, both bases and the datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from app.main_memory import memory_of_all
from app.schemas.common import as_json
from app.schemas.transfer import SeedsDigest, TransferParams
from app.settings import Settings
from app.stored_inputs import stored_dataset
from app.transfer_subject import Subject, check_adapter, digest_of, find_subject, fingerprint_of
from artifacts.errors import FieldError, NotFound, RequestInvalid, StateConflict
from artifacts.pointers import pointers_below
from storage import aliases, transferables, transfers
from storage.tables import DatasetRow
from storage.transfers import TransferFacts
from train.catalog import find_method as find_training
from train.estimate import check_fits, estimate
from train.options.common import Circumstances
from train.packed_base import fitted
from train.settings import CausalLmTask
from train.targets import check_method, wanted_targets
from transfer.catalog import TransferMethod, find_method, parse_parameters
from transfer.engine_outlook import check_transferred
from transfer.identity import TransferIdentity, canonical_digest
from transfer.options import (
    MAX_ROWS,
    DistilOptions,
    LorasuiteOptions,
    TransferOptions,
    TransLoraOptions,
)
from transfer.owner_rows import INPUT_COLUMNS, ITEM_COLUMNS
from transfer.seeds import parse_seeds, seeds_digest
from transfer.target_layers import query_and_value

MAX_HOLDOUT = 10_000
"""Items that a transfer is measured with; each is answered by every arm."""
_NO_DISCRIMINATOR = (
    "Take parameters.filter excess or tuneshift_kd, which need none; or train the adapter with `transferable`, which "
    "keeps one."
)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """A transfer that can be made.

    Attributes:
        params: of the job: the seeds by their digest alone.
        sealed: what only its worker reads: {seeds, task, format, discriminator}.
    """

    params: TransferParams
    facts: TransferFacts
    sealed: Mapping[str, Any]

    @property
    def affinity(self) -> str:
        """The base model that most of the work is done on."""
        return self.facts.target_model


def plan_transfer(
    settings: Settings, session: Session, request: TransferParams, seeds: Sequence[str] | None = None, devices: int = 1
) -> TransferPlan:
    """Refuse what can never be done, and say what would be.

    The source adapter stays locked until the transaction ends, so that of two equal requests one comes first.

    Args:
        seeds: as they were sent; None: those that the request names by their digest, or that the adapter keeps.

    Raises:
        RequestInvalid and its kin: an unknown adapter, base model or dataset; parameters that do not fit; something
            that the method needs is missing.
        StateConflict: the method needs a discriminator, and the adapter keeps none.
    """
    if devices > 1:
        problem = "a transfer runs on one device"
        raise RequestInvalid(f"{problem}.", errors=[FieldError("/resources/devices", problem)])
    method = find_method(request.method)
    options = parse_parameters(request.method, request.parameters)
    subject = find_subject(session, request)
    if request.alias is not None:
        _check_alias(session, request.alias, subject)
    check_adapter(subject, method, options)
    _check_target(settings, session, subject, options)
    if request.target_engine is not None:
        check_transferred(options, request.target_engine)
    _check_controls(request, method, options)
    inputs = _dataset(session, request.inputs, "/inputs", INPUT_COLUMNS, MAX_ROWS)
    holdout = _dataset(session, request.holdout, "/holdout", ITEM_COLUMNS, MAX_HOLDOUT)
    used = _seeds(session, subject, request, seeds, method, options)
    _check_needs(method, options, used, inputs)
    sealed = _sealed(subject, request, options, used)
    key = _identity(subject, request, options, used, inputs, sealed).key
    measured = {
        "key": key,
        "holdout": None if holdout is None else [holdout.sha256, holdout.format],
        "gate": as_json(request.gate),
        "controls": request.controls,
    }
    if request.alias is not None:
        measured["alias"] = request.alias
    if request.target_engine is not None:
        measured["target_engine"] = request.target_engine
    digest = None if used is None else seeds_digest(used)
    told = None if used is None or digest is None else SeedsDigest(count=len(used), digest=digest)
    facts = TransferFacts(
        key=key,
        request_key=canonical_digest(measured),
        adapter_id=subject.row.id,
        adapter_name=subject.row.name,
        source_model=subject.source.id,
        target_model=subject.target.id,
        method=method.name,
        seeds_digest=digest,
    )
    return TransferPlan(request.model_copy(update={"seeds": told}), facts, sealed)


def _check_alias(session: Session, name: str, subject: Subject) -> None:
    """Refuse an alias that points elsewhere: it could not move with this adapter."""
    try:
        points_to = aliases.get_alias(session, name).adapter_id
    except NotFound:
        points_to = None
    # The same request again, after its transfer has moved the alias, is answered with that transfer.
    if subject.row.id not in (points_to, aliases.moved_from(session, name)):
        state = "there is no such alias" if points_to is None else f"it points to {points_to}, not to the adapter"
        raise RequestInvalid(
            f"/alias: {state}.",
            hint="PUT /aliases/{name} points one to an adapter.",
            errors=[FieldError("/alias", state)],
        )


def _check_target(settings: Settings, session: Session, subject: Subject, options: TransferOptions) -> None:
    """Refuse layers that the target does not have, a rank that fits none, and a training that memory can not hold."""
    target = subject.target
    if not isinstance(options, DistilOptions) or isinstance(options, LorasuiteOptions) or target.fingerprint is None:
        return
    linear = {path: (d_out, d_in) for path, d_out, d_in in fingerprint_of(target)}
    kind, task = find_training(options.target_method), CausalLmTask(max_length=options.max_length)
    with pointers_below("/parameters/target_method", "/method"):
        kind.check_task(task.type)
    settled = "target_modules" in options.target_parameters or not kind.options.adapts_layers
    chosen = options.train_options(() if settled else tuple(query_and_value(linear)))
    with pointers_below("/parameters/target_method", "/base_model"):
        fitted(kind, chosen, target.quantisation)
    with pointers_below("/parameters/target_parameters", "/parameters"):
        targets = wanted_targets(linear, chosen, task)
        check_method(chosen, Circumstances(targets, options.training, options.training.steps, None))
    memory = memory_of_all(settings, session)
    if memory is not None:
        with pointers_below("/parameters"):
            needed = estimate(chosen, targets, linear, options.training, task, target.parameter_count)
            check_fits(needed, memory, "this machine")


def _check_controls(request: TransferParams, method: TransferMethod, options: TransferOptions) -> None:
    """Refuse controls that need more than the transfer has, or nothing to measure them with."""
    problems = []
    for place, name in enumerate(request.controls):
        with pointers_below(f"/controls/{place}", "/method"):
            row = find_method(name)
        if name == method.name or name in request.controls[:place]:
            problems.append(FieldError(f"/controls/{place}", f"{name} is measured already"))
        elif row.capabilities.trains and name != "seeds-only":
            problems.append(FieldError(f"/controls/{place}", f"{name} needs more than a control is given"))
    measured = request.holdout is not None or (isinstance(options, TransLoraOptions) and options.held_out > 0)
    if request.controls and not measured:
        problems.append(FieldError("/controls", "there is nothing to measure with: give a holdout"))
    if problems:
        raise RequestInvalid(f"{problems[0].pointer}: {problems[0].message}.", errors=problems)


def _dataset(
    session: Session, dataset_id: str | None, pointer: str, columns: Sequence[str], limit: int
) -> DatasetRow | None:
    if dataset_id is None:
        return None
    with pointers_below(pointer, "/dataset"):
        row = stored_dataset(session, dataset_id)
    known = {column["name"] for column in row.columns}
    missing = [column for column in columns if column not in known]
    problem = None
    if missing:
        problem = f"the dataset {row.name!r} has no column {' and no column '.join(missing)}"
    elif row.rows > limit:
        problem = f"the dataset {row.name!r} has {row.rows} rows; at most {limit} can be used"
    if problem is not None:
        raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError(pointer, problem)])
    return row


def _seeds(
    session: Session,
    subject: Subject,
    request: TransferParams,
    given: Sequence[str] | None,
    method: TransferMethod,
    options: TransferOptions,
) -> tuple[str, ...] | None:
    """The seeds that are used: those that were sent, or named, or that the adapter keeps; None if none are needed."""
    needed = (
        "seeds" in method.capabilities.needs
        or "seeds-only" in request.controls
        or (isinstance(options, LorasuiteOptions) and request.inputs is None)
    )
    if not needed:
        if given is not None or request.seeds is not None:
            problem = f"{method.name} reads no seeds"
            raise RequestInvalid(f"/seeds: {problem}.", errors=[FieldError("/seeds", problem)])
        return None
    if given is not None:
        return parse_seeds(given)
    kept = None if subject.kept is None else tuple(subject.kept.seeds)
    if request.seeds is not None:
        if kept is not None and seeds_digest(kept) == request.seeds.digest:
            return kept
        sealed = transfers.sealed_of(session, subject.row.id, request.seeds.digest)
        if sealed is None:
            problem = "these seeds are not kept any more: send their texts again"
            raise RequestInvalid(f"/seeds: {problem}.", errors=[FieldError("/seeds/digest", problem)])
        return tuple(sealed["seeds"])
    if kept is None:
        return parse_seeds(())  # says how many are needed
    return kept


def _check_needs(
    method: TransferMethod, options: TransferOptions, seeds: tuple[str, ...] | None, inputs: DatasetRow | None
) -> None:
    wanted = "inputs" in method.capabilities.needs
    if inputs is not None and not wanted:
        problem = f"{method.name} reads no inputs that were kept"
        raise RequestInvalid(f"/inputs: {problem}.", errors=[FieldError("/inputs", problem)])
    if wanted and inputs is None and (seeds is None or not isinstance(options, LorasuiteOptions)):
        problem = f"{method.name} needs inputs that were kept"
        raise RequestInvalid(
            f"/inputs: {problem}.",
            hint="Upload them as a dataset with a column prompt, or take trans-lora, which invents its own.",
            errors=[FieldError("/inputs", problem)],
        )


def _sealed(
    subject: Subject, request: TransferParams, options: TransferOptions, seeds: tuple[str, ...] | None
) -> dict[str, Any]:
    """What the worker is given beside the parameters."""
    kept = subject.kept
    task = request.task
    if kept is not None:
        if task is not None and task != kept.task:
            problem = f"the adapter keeps {kept.task!r}, which its discriminator is asked about"
            raise RequestInvalid(f"/task: {problem}.", errors=[FieldError("/task", problem)])
        task = kept.task
    form: Mapping[str, Any] = {} if kept is None else kept.prompt_format
    if request.format is not None:
        form = as_json(request.format)
    found = {"seeds": list(seeds or ()), "task": task, "format": dict(form), "discriminator": None}
    if isinstance(options, TransLoraOptions) and options.filter == "discriminator":
        found["discriminator"] = _discriminator(subject)
    return found


def _discriminator(subject: Subject) -> dict[str, Any]:
    kept = subject.kept
    problem = None
    if kept is None:
        problem = f"the adapter {subject.row.name!r} has no discriminator"
    elif kept.discriminator_base.get("weights_digest") != subject.source.weights_digest:
        problem = f"the discriminator of {subject.row.name!r} belongs to another base model"
    if kept is None or problem is not None:
        raise StateConflict(
            f"{problem}.", hint=_NO_DISCRIMINATOR, errors=[FieldError("/parameters/filter", f"{problem}")]
        )
    return {
        "digest": kept.discriminator_digest,
        "recipe": kept.recipe,
        "auc": kept.auc,
        "files": [{"path": file.path, "sha256": file.sha256} for file in transferables.files_of(kept)],
    }


def _identity(
    subject: Subject,
    request: TransferParams,
    options: TransferOptions,
    seeds: tuple[str, ...] | None,
    inputs: DatasetRow | None,
    sealed: Mapping[str, Any],
) -> TransferIdentity:
    discriminator = sealed["discriminator"]
    return TransferIdentity(
        adapter=subject.row.identity_digest,
        source_base=digest_of(subject.source),
        target_base=digest_of(subject.target),
        seeds=None if seeds is None else seeds_digest(seeds),
        discriminator=None if discriminator is None else discriminator["digest"],
        task=sealed["task"],
        format=sealed["format"],
        method=request.method,
        parameters=options.decisive(),
        seed=request.seed,
        inputs=None if inputs is None else canonical_digest([inputs.format, inputs.sha256]),
    )
