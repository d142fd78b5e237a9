"""What a transfer moves, and where to: whether the adapter, its base model and the target suit the method."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from app.base_models import base_model
from app.schemas.transfer import TransferParams
from app.stored_inputs import stored_adapters
from artifacts.base_model import check_modules
from artifacts.errors import FieldError, NotMergeable, TransferRefused
from artifacts.manifest import AdapterManifest
from artifacts.quantised_base import packed_layers
from storage import adapters, models, transferables
from storage.tables import AdapterRow, ModelRow, TransferableRow
from transfer.catalog import TransferMethod
from transfer.identity import base_identity
from transfer.options import TransferOptions, WeightOptions

_LISTED = 20
_NO_CAUSAL_LM = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is moved, and where to."""

    row: AdapterRow
    manifest: AdapterManifest
    source: ModelRow
    target: ModelRow
    kept: TransferableRow | None


def find_subject(session: Session, request: TransferParams) -> Subject:
    """The adapter, which stays locked until the transaction ends, and both base models.

    Raises:
        RequestInvalid and its kin: one of them is unknown or removed, or is no causal language model.
    """
    row = stored_adapters(session, [("/adapter", request.adapter)])[request.adapter]
    session.refresh(row, attribute_names=["deleted_at"], with_for_update=True)
    source = adapters.model_of(session, row)
    if source is None:
        named = (
            "names no base model" if row.base_model is None else f"names {row.base_model!r}, which is not registered"
        )
        problem = f"the adapter {row.name!r} {named}"
        raise TransferRefused(
            f"T{problem[1:]}; its answers are needed, and so is its base.",
            hint="Register the base model with POST /models.",
            errors=[FieldError("/adapter", problem)],
        )
    session.refresh(source, with_for_update={"read": True})
    if source.removed_at is not None:
        problem = f"its base model {source.name!r} was removed on {source.removed_at:%Y-%m-%d}"
        raise TransferRefused(f"The adapter can not be moved: {problem}.", errors=[FieldError("/adapter", problem)])
    target = base_model(session, request.target_model, lock=True, pointer="/target_model")
    for pointer, model in (("/adapter", source), ("/target_model", target)):
        _check_model(pointer, model)
    return Subject(row, adapters.manifest_of(row), source, target, transferables.get(session, row.id))


def _check_model(pointer: str, model: ModelRow) -> None:
    """Refuse a base that is no causal language model, or of which nothing is known."""
    found = model.pipeline or model.architecture or ""
    bare = found.endswith("Model") and not found.endswith("LMHeadModel")
    if model.pipeline is not None or bare or found.endswith(_NO_CAUSAL_LM):
        problem = f"the base model {model.name!r} is a {found}, no causal language model"
        raise TransferRefused(f"T{problem[1:]}.", errors=[FieldError(pointer, problem)])
    if packed_layers(model.quantisation):
        problem = f"the weights of the base model {model.name!r} are packed"
        raise TransferRefused(
            f"T{problem[1:]}: no adapter is moved from it or to it.",
            hint="Take the base model that it was made of.",
            errors=[FieldError(pointer, problem)],
        )
    if model.weights_digest is None or model.tokenizer_digest is None:
        what = "weights" if model.weights_digest is None else "tokenizer"
        problem = f"the {what} of the base model {model.name!r} are not known to the server, only its name"
        raise TransferRefused(
            f"T{problem[1:]}: two transfers could not be told apart.",
            hint="Register the model's folder, with its tokenizer, by `path`.",
            errors=[FieldError(pointer, problem)],
        )


def check_adapter(subject: Subject, method: TransferMethod, options: TransferOptions) -> None:
    """Refuse an adapter that the method can not move. Raises TransferRefused, NotMergeable."""
    row, manifest = subject.row, subject.manifest
    task = manifest.config.get("task_type")
    if row.format != "peft" or task not in (None, "CAUSAL_LM"):
        problem = f"the adapter {row.name!r} is of {task}" if row.format == "peft" else f"its format is {row.format}"
        raise TransferRefused(
            f"Adapters of causal language models in PEFT's format can be moved: {problem}.",
            errors=[FieldError("/adapter", problem)],
        )
    if subject.source.fingerprint is not None:
        offenders = check_modules(fingerprint_of(subject.source), manifest.modules)
        if offenders:
            problem = f"{len(offenders)} of its modules do not fit its base model {subject.source.name!r}"
            raise TransferRefused(
                f"The adapter can not be moved: {problem}.",
                errors=[
                    FieldError("/adapter", problem),
                    *(FieldError("/adapter", item) for item in offenders[:_LISTED]),
                ],
            )
    if method.capabilities.any_source:
        return
    linear = all(module.kind == "linear" and module.bias_key is None for module in manifest.modules)
    if not manifest.mergeable or not linear:
        problem = manifest.refusal or "it adapts more than linear layers without biases"
        raise NotMergeable(
            f"{method.title} moves plain LoRAs only: {problem}",
            hint="Take trans-lora, which needs only the adapter's answers.",
            errors=[FieldError("/adapter", problem)],
        )
    if isinstance(options, WeightOptions):
        _check_weights(subject, options)


def _check_weights(subject: Subject, options: WeightOptions) -> None:
    """Refuse weights that have no place in the target, or that are there already."""
    if digest_of(subject.source) == digest_of(subject.target):
        problem = "it is the adapter's own base model: there is nothing to move"
        raise TransferRefused(f"The target base is refused: {problem}.", errors=[FieldError("/target_model", problem)])
    if subject.target.fingerprint is None:
        return
    fingerprint, modules = fingerprint_of(subject.target), subject.manifest.modules
    known = {path for path, _, _ in fingerprint}
    # Other widths are the method's affair, if it bridges them; a layer that is not there is nobody's.
    offenders = [f"{module.path}: no such module" for module in modules if module.path not in known]
    if options.subspace_rank is None:
        offenders = check_modules(fingerprint, modules)
    if offenders and (not options.partial or len(offenders) == len(modules)):
        problem = f"{len(offenders)} of {len(modules)} modules have no place in {subject.target.name!r}"
        raise TransferRefused(
            f"{problem}; the first: {offenders[0]}.",
            hint="Take trans-lora, which needs no likeness of the two bases.",
            errors=[
                FieldError("/target_model", problem),
                *(FieldError("/target_model", item) for item in offenders[:_LISTED]),
            ],
        )


def digest_of(model: ModelRow) -> str:
    """Of weights and tokenizer, which are known of every subject."""
    assert model.weights_digest is not None
    assert model.tokenizer_digest is not None
    return base_identity(model.weights_digest, model.tokenizer_digest)


def fingerprint_of(model: ModelRow) -> tuple[tuple[str, int, int], ...]:
    """Its layers; none if they are not known."""
    return models.ref_of(model).fingerprint or ()
