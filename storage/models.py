"""Registered base models."""

from __future__ import annotations

import hashlib
import json

from sqlalchemy import case, or_, select
from sqlalchemy.orm import Session, defer

from artifacts.base_model import BaseModelRef
from artifacts.errors import Conflict, NotFound
from storage import database
from storage.domain_events import publish
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import ModelRow
from storage.text import is_storable, storable
from storage.upsert import insert_or_ignore


def add_model(session: Session, ref: BaseModelRef, *, parameter_count: int | None = None) -> tuple[ModelRow, bool]:
    """Register a base model. The same location, revision and weights again give the first row, with False.

    Raises:
        Conflict: the name belongs to another model.
        RequestInvalid: a text that can not be stored.
    """
    identity = _identity(ref)
    values = {
        "id": new_id("mdl"),
        "name": storable(ref.name, "/name", 300),
        "identity_digest": identity,
        "source": ref.source,
        "location": storable(ref.location, "/location"),
        "revision": None if ref.revision is None else storable(ref.revision, "/revision", 64),
        "architecture": None if ref.architecture is None else storable(ref.architecture, "/architecture", 200),
        "pipeline": None if ref.pipeline is None else storable(ref.pipeline, "/pipeline", 200),
        "weights_digest": ref.weights_digest,
        "tokenizer_digest": ref.tokenizer_digest,
        "fingerprint": None if ref.fingerprint is None else [list(entry) for entry in ref.fingerprint],
        "fingerprint_digest": ref.fingerprint_digest,
        "quantisation": None if ref.quantisation is None else dict(ref.quantisation),
        "parameter_count": parameter_count,
        "created_at": database.now(session),
    }
    added = session.scalar(insert_or_ignore(session, ModelRow, values).returning(ModelRow.id))
    row = session.scalars(
        select(ModelRow).where(ModelRow.identity_digest == identity).execution_options(populate_existing=True)
    ).one_or_none()
    if row is None:
        raise Conflict(
            f"the name {ref.name!r} belongs to a model of another location, revision or weights",
            hint="Register it under another name.",
        )
    if added is not None:
        publish(session, "base_model.registered", row.id, {"name": row.name})
    return row, added is not None


def get_model(session: Session, id_or_name: str) -> ModelRow:
    """Raises NotFound."""
    row = find_model(session, id_or_name)
    if row is None:
        raise NotFound(f"there is no model {id_or_name!r}", hint="Register it with POST /models.")
    return row


def find_model(session: Session, name: str, revision: str | None = None) -> ModelRow | None:
    """The model with this id, name or location, best match in this order; among several the newest.

    Args:
        revision: if given, a model that has another one does not match, and one that has it comes first.
    """
    if not is_storable(name) or (revision is not None and not is_storable(revision)):
        return None
    quality = case((ModelRow.id == name, 0), (ModelRow.name == name, 1), else_=2)
    statement = select(ModelRow).where(or_(ModelRow.id == name, ModelRow.name == name, ModelRow.location == name))
    order = [quality]
    if revision is not None:
        statement = statement.where(or_(ModelRow.revision == revision, ModelRow.revision.is_(None)))
        order.insert(0, case((ModelRow.revision == revision, 0), else_=1))
    return session.scalars(statement.order_by(*order, ModelRow.created_at.desc(), ModelRow.id.desc()).limit(1)).first()


def list_models(session: Session, cursor: str | None = None, limit: int = DEFAULT_LIMIT) -> Page[ModelRow]:
    """All models, newest first; their fingerprints are not loaded: reading them raises.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    statement = select(ModelRow).options(defer(ModelRow.fingerprint, raiseload=True))
    return page_of(session, statement, (ModelRow.created_at, ModelRow.id), filters={}, cursor=cursor, limit=limit)


def lock_model(session: Session, id_or_name: str) -> ModelRow:
    """The model as it is now, locked until the transaction ends. Raises NotFound."""
    row = get_model(session, id_or_name)
    session.refresh(row, with_for_update=True)
    return row


def ref_of(row: ModelRow) -> BaseModelRef:
    """The model as the compatibility rules take it."""
    fingerprint = None if row.fingerprint is None else tuple((str(p), int(o), int(i)) for p, o, i in row.fingerprint)
    return BaseModelRef(
        name=row.name,
        source=row.source,  # type: ignore[arg-type]  # only BaseModelRef's own values were stored
        location=row.location,
        revision=row.revision,
        architecture=row.architecture,
        pipeline=row.pipeline,
        weights_digest=row.weights_digest,
        tokenizer_digest=row.tokenizer_digest,
        fingerprint=fingerprint,
        quantisation=row.quantisation,
    )


def _identity(ref: BaseModelRef) -> str:
    parts = json.dumps([ref.source, ref.location, ref.revision, ref.weights_digest], ensure_ascii=False)
    return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()
