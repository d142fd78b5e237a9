"""Adapters: add (the same content once), find, delete, and how one came from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from artifacts.base_model import BaseModelRef
from artifacts.errors import Conflict, NotFound
from artifacts.manifest import (
    Ability,
    AdapterManifest,
    FileEntry,
    FormatFacts,
    IgnoredKey,
    IntakeReport,
    LoraModule,
    NestedRanks,
    TypedModule,
)
from storage import aliases, database, models, sealed_inputs, transferables
from storage.adapter_keys import add_keys
from storage.adapter_search import AdapterFilter, list_adapters
from storage.blob_rows import reserve_blobs
from storage.ids import new_id
from storage.lineage import Lineage, lineage
from storage.quotas import charge_bytes
from storage.tables import AdapterFileRow, AdapterRow, AdapterTagRow, AdapterWaiverRow, LineageRow, ModelRow
from storage.text import fold, is_storable, short_digest, storable
from storage.tombstones import hide, lock_shown
from storage.upsert import insert_or_ignore

__all__ = [
    "AdapterFilter",
    "Lineage",
    "Parent",
    "add_adapter",
    "base_of",
    "delete_adapter",
    "get_adapter",
    "lineage",
    "list_adapters",
    "manifest_columns",
    "manifest_from",
    "manifest_of",
    "model_of",
    "reserve_blobs",
]

MANIFEST_COLUMNS = tuple(item.name for item in fields(AdapterManifest) if item.name not in ("files", "keys"))
"""What the table keeps of a manifest, under the same names."""
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter that a new one is made from, with the exact recipe of that step (JSON)."""

    id: str
    recipe: dict[str, Any] = field(default_factory=dict)


def add_adapter(
    session: Session,
    manifest: AdapterManifest,
    *,
    name: str,
    description: str = "",
    tags: Sequence[str] = (),
    base_model: str | None = None,
    model_id: str | None = None,
    origin: str = "upload",
    job_id: str | None = None,
    created_by: str | None = None,
    parents: Sequence[Parent] = (),
    source: Mapping[str, Any] | None = None,
) -> tuple[AdapterRow, bool]:
    """Store what the manifest says; the blobs of its files must be in the store already.

    A live adapter of the same identity is returned as it is, with False: neither its name nor its lineage changes.
    Two calls at once give one row: the later one waits for the earlier transaction.

    Args:
        base_model: replaces the name that the files give.
        model_id: the registered base model.
        origin: "upload", or the kind of the job that made it.
        parents: in the order of the recipe; a parent may have been deleted meanwhile.
        source: where the files were fetched from, pinned as far as they can be (JSON).

    Raises:
        NotFound: no such parent or model.
        QuotaExceeded: a new adapter, and more bytes than the key that makes it may store.
        RequestInvalid: a text that can not be stored.
    """
    if model_id is not None and (not is_storable(model_id) or session.get(ModelRow, model_id) is None):
        raise NotFound(f"there is no model {model_id!r}")
    for parent in parents:
        get_adapter(session, parent.id, deleted=True)
    reserve_blobs(session, manifest.files)
    values = _columns(manifest, name=name, description=description, tags=tags, base_model=base_model) | {
        "model_id": model_id,
        "origin": storable(origin, "/origin", 16),
        "job_id": job_id,
        "source": None if source is None else dict(source),
        "created_by": created_by,
        "created_at": database.now(session),
    }
    for _ in range(_TRIES):
        added = insert_or_ignore(session, AdapterRow, values).returning(AdapterRow.id)
        if session.scalar(added) is not None:
            charge_bytes(session, created_by, manifest.size)
            _add_files(session, values["id"], manifest.files, values["created_at"])
            _add_tags(session, values)
            _add_lineage(session, values["id"], parents, job_id)
            add_keys(session, values["id"], manifest.keys)
            return get_adapter(session, values["id"]), True
        same = session.scalars(
            select(AdapterRow)
            .where(AdapterRow.identity_digest == manifest.identity_digest, AdapterRow.deleted_at.is_(None))
            .execution_options(populate_existing=True)
        ).one_or_none()
        if same is not None:
            return same, False
        # it was deleted between the two statements: try to add again
    raise Conflict("the same adapter is being added and deleted over and over", hint="Try again.")


def get_adapter(session: Session, adapter_id: str, *, deleted: bool = False) -> AdapterRow:
    """The adapter with its files; with `deleted` also one that was deleted.

    Raises:
        NotFound
    """
    row = session.get(AdapterRow, adapter_id) if is_storable(adapter_id) else None
    if row is None or (row.deleted_at is not None and not deleted):
        state = "there is no adapter" if row is None else "deleted: adapter"
        raise NotFound(f"{state} {adapter_id!r}")
    return row


def delete_adapter(session: Session, adapter_id: str) -> None:
    """Hide the adapter. Its bytes go with a later sweep, its row only when nothing descends from it; what it kept for
    transfers goes at once, unless an unfinished job needs it.

    Raises:
        NotFound: no such adapter, or deleted before.
        StateConflict: aliases point to it.
    """
    row = lock_shown(session, AdapterRow, adapter_id)
    if row is None:
        raise NotFound(f"there is no adapter {adapter_id!r}")
    aliases.check_unused(session, adapter_id)
    session.execute(delete(AdapterTagRow).where(AdapterTagRow.adapter_id == adapter_id))
    transferables.drop_with_adapter(session, adapter_id)
    session.execute(delete(AdapterWaiverRow).where(AdapterWaiverRow.adapter_id == adapter_id))
    hide(session, row)
    sealed_inputs.drop_of_adapter(session, adapter_id)


def manifest_of(row: AdapterRow) -> AdapterManifest:
    """The manifest that the adapter was added with; its files are gone if it was deleted and swept."""
    known = {name: getattr(row, name) for name in MANIFEST_COLUMNS}
    return manifest_from(known, [FileEntry(file.path, file.sha256, file.size, file.media_type) for file in row.files])


def manifest_columns(manifest: AdapterManifest) -> dict[str, Any]:
    """All of a manifest but its files, as JSON."""
    return {
        **{name: getattr(manifest, name) for name in MANIFEST_COLUMNS},
        "target_modules": list(manifest.target_modules),
        "config": dict(manifest.config),
        "modules": [asdict(module) for module in manifest.modules],
        "report": _report(manifest.report),
    }


def manifest_from(columns: Mapping[str, Any], files: Sequence[FileEntry]) -> AdapterManifest:
    """What `manifest_columns` gave, with the files."""
    report = columns["report"]
    return AdapterManifest(
        **{
            **columns,
            "target_modules": tuple(columns["target_modules"]),
            "modules": tuple(_module(document) for document in columns["modules"]),
            "report": IntakeReport(
                used_keys=report["used_keys"],
                ignored=tuple(IgnoredKey(**entry) for entry in report["ignored"]),
                nonfinite=report["nonfinite"],
                dropped_files=tuple(IgnoredKey(**entry) for entry in report["dropped_files"]),
                warnings=tuple(report["warnings"]),
                nested=_nested(report.get("nested")),
                facts=_facts(report.get("facts")),
            ),
        },
        files=tuple(files),
    )


def base_of(session: Session, row: AdapterRow) -> BaseModelRef | None:
    """What is known of the adapter's base model: the registered model it names, else only the name.

    None if neither the files nor the uploader named one.
    """
    model = model_of(session, row)
    if model is not None:
        return models.ref_of(model)
    return None if row.base_model is None else BaseModelRef.named(row.base_model, row.base_model_revision)


def model_of(session: Session, row: AdapterRow) -> ModelRow | None:
    """The registered base model that the adapter names, if there is one."""
    model = session.get(ModelRow, row.model_id) if row.model_id is not None else None
    if model is None and row.base_model is not None:
        model = models.find_model(session, row.base_model, row.base_model_revision)
    return model


def _columns(
    manifest: AdapterManifest, *, name: str, description: str, tags: Sequence[str], base_model: str | None
) -> dict[str, Any]:
    base = base_model if base_model is not None else manifest.base_model
    revision = manifest.base_model_revision if base == manifest.base_model else None
    return {
        **manifest_columns(manifest),
        "id": new_id("adp"),
        "name": storable(name, "/name", 200),
        "name_folded": fold(name),
        "description": storable(description, "/description"),
        "tags": [storable(tag, f"/tags/{position}", 200) for position, tag in enumerate(tags)],
        "format": storable(manifest.format, "/format", 40),
        "method": storable(manifest.method, "/method", 40),
        "base_model": None if base is None else storable(base, "/base_model", 300),
        "base_model_revision": None if revision is None else storable(revision, "/base_model_revision", 64),
        "module_count": len(manifest.modules) + len(manifest.report.facts.typed),
        "dtype": storable(manifest.dtype, "/dtype", 16),
        "size": manifest.size,
        "refusal": None if manifest.refusal is None else storable(manifest.refusal, "/refusal"),
    }


def _report(report: IntakeReport) -> dict[str, Any]:
    return {
        "used_keys": report.used_keys,
        "ignored": [asdict(entry) for entry in report.ignored],
        "nonfinite": dict(report.nonfinite),
        "dropped_files": [asdict(entry) for entry in report.dropped_files],
        "warnings": list(report.warnings),
        "facts": asdict(report.facts),
    } | ({} if report.nested is None else {"nested": asdict(report.nested)})


def _nested(document: Mapping[str, Any] | None) -> NestedRanks | None:
    return None if document is None else NestedRanks(tuple(document["ranks"]), document["scale_mode"])


def _module(document: Mapping[str, Any]) -> LoraModule:
    shapes: dict[str, Any] = {name: tuple(document.get(name, ())) for name in ("a_shape", "b_shape", "block_shape")}
    shapes["b_rows"] = tuple((start, stop) for start, stop in document.get("b_rows", ()))
    span = document.get("rank_span")
    shapes["rank_span"] = None if span is None else (span[0], span[1])
    return LoraModule(**{**document, **shapes})


def _facts(document: Mapping[str, Any] | None) -> FormatFacts:
    if document is None:
        return FormatFacts()
    return FormatFacts(
        architecture=document["architecture"],
        modules_in_file=document["modules_in_file"],
        partial=document["partial"],
        composable=Ability(**document["composable"]),
        exact_as_lora=Ability(**document["exact_as_lora"]),
        typed=tuple(TypedModule(**{**item, "targets": tuple(item["targets"])}) for item in document["typed"]),
        lasting=tuple(document.get("lasting", ())),
    )


def _add_files(session: Session, adapter_id: str, files: Sequence[FileEntry], created_at: datetime) -> None:
    session.add_all(
        AdapterFileRow(
            adapter_id=adapter_id,
            path=storable(file.path, "/file", 300),
            sha256=file.sha256,
            size=file.size,
            media_type=storable(file.media_type, "/media_type", 100),
            created_at=created_at,
        )
        for file in files
    )
    session.flush()


def _add_tags(session: Session, values: Mapping[str, Any]) -> None:
    base = values["base_model"]
    carried = {name: values[name] for name in ("created_at", "model_id", "method", "name_folded")}
    carried["base_model_digest"] = None if base is None else short_digest(base)
    session.add_all(AdapterTagRow(tag=tag, adapter_id=values["id"], **carried) for tag in dict.fromkeys(values["tags"]))
    session.flush()


def _add_lineage(session: Session, adapter_id: str, parents: Sequence[Parent], job_id: str | None) -> None:
    """One edge for each parent; one that the recipe names twice keeps its first place."""
    first: dict[str, tuple[int, Parent]] = {}
    for position, parent in enumerate(parents):
        first.setdefault(parent.id, (position, parent))
    session.add_all(
        LineageRow(child_id=adapter_id, parent_id=parent.id, position=position, job_id=job_id, recipe=parent.recipe)
        for position, parent in first.values()
    )
    session.flush()
