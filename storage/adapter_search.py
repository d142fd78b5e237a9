"""Lists of adapters and their filters."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from sqlalchemy import ColumnElement, Select, and_, cast, exists, false, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, defer

from artifacts.errors import FieldError, RequestInvalid
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import AdapterFileRow, AdapterRow
from storage.text import fold, is_storable

AUTOV2_LENGTH = 10  # civitai's AutoV2: so many of the first hex digits of the file's SHA-256


@dataclass(frozen=True, slots=True)
class AdapterFilter:
    """Which adapters to list; None does not filter.

    Attributes:
        base_model: name of the base model as the adapter gives it, or the id of a registered one.
        method: e.g. "lora".
        tag: one of its tags, exactly.
        name: part of its name, whatever the case.
        sha256: of any of its files, or its weights digest: 64 hex digits; or AutoV2: the first 10 of a file's.
    """

    base_model: str | None = None
    method: str | None = None
    tag: str | None = None
    name: str | None = None
    sha256: str | None = None


def list_adapters(
    session: Session, filters: AdapterFilter | None = None, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[AdapterRow]:
    """The adapters that are not deleted, newest first. Their `modules` are not loaded: reading them raises.

    Raises:
        RequestInvalid: `sha256` is not 10 or 64 hex digits; a bad cursor or limit.
    """
    chosen = filters or AdapterFilter()
    statement = select(AdapterRow).where(AdapterRow.deleted_at.is_(None))
    statement = _filtered(session, statement, chosen).options(defer(AdapterRow.modules, raiseload=True))
    return page_of(
        session, statement, (AdapterRow.created_at, AdapterRow.id), filters=asdict(chosen), cursor=cursor, limit=limit
    )


def _filtered(session: Session, statement: Select[AdapterRow], chosen: AdapterFilter) -> Select[AdapterRow]:
    if not all(value is None or is_storable(value) for value in asdict(chosen).values()):
        return statement.where(false())
    if chosen.base_model is not None:
        statement = statement.where(
            or_(AdapterRow.base_model == chosen.base_model, AdapterRow.model_id == chosen.base_model)
        )
    if chosen.method is not None:
        statement = statement.where(AdapterRow.method == chosen.method)
    if chosen.tag is not None:
        statement = statement.where(_has_tag(session, chosen.tag))
    if chosen.name is not None:
        statement = statement.where(AdapterRow.name_folded.contains(fold(chosen.name), autoescape=True))
    if chosen.sha256 is not None:
        statement = statement.where(_has_digest(chosen.sha256.lower()))
    return statement


def _has_tag(session: Session, tag: str) -> ColumnElement[bool]:
    if session.get_bind().dialect.name == "postgresql":
        return cast(AdapterRow.tags, JSONB).contains([tag])
    each = func.json_each(AdapterRow.tags).table_valued("value", name="tag")
    return exists(select(1).select_from(each).where(each.c.value == tag))


def _has_digest(digest: str) -> ColumnElement[bool]:
    file = and_(AdapterFileRow.adapter_id == AdapterRow.id)
    if re.fullmatch(r"[0-9a-f]{64}", digest):
        return or_(AdapterRow.weights_digest == digest, exists().where(file, AdapterFileRow.sha256 == digest))
    if re.fullmatch(rf"[0-9a-f]{{{AUTOV2_LENGTH}}}", digest):
        return exists().where(file, AdapterFileRow.sha256.startswith(digest))
    problem = f"must be 64 hex digits, or the first {AUTOV2_LENGTH} (AutoV2), not {digest!r}"
    raise RequestInvalid(f"sha256 {problem}", errors=[FieldError("/sha256", problem)])
