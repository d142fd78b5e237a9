"""The verdicts on the keys of an adapter's file: written once with the adapter, read a page at a time."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

from sqlalchemy.orm import Session

from artifacts.errors import FieldError, RequestInvalid
from artifacts.manifest import AdapterManifest, KeyUse, KeyVerdict
from storage.key_tables import AdapterKeysRow
from storage.pagination import Page


def add_keys(session: Session, adapter_id: str, keys: Sequence[KeyVerdict]) -> None:
    """Keep the verdicts of a new adapter; nothing when there are none."""
    if not keys:
        return
    rows = [[item.key, item.use, item.role, item.modules, item.note] for item in keys]
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    session.add(AdapterKeysRow(adapter_id=adapter_id, count=len(rows), document=zlib.compress(text, 6)))
    session.flush()


def keys_page(
    session: Session, adapter_id: str, manifest: AdapterManifest, *, use: KeyUse | None, cursor: str | None, limit: int
) -> Page[KeyVerdict]:
    """Some of the verdicts, in the order of the file.

    Of an adapter that was stored before verdicts were kept, they are what its modules and its report tell.

    Raises:
        RequestInvalid: the cursor is none of this list.
    """
    row = session.get(AdapterKeysRow, adapter_id)
    found = _told(manifest) if row is None else _read(row.document)
    if use is not None:
        found = [item for item in found if item.use == use]
    start = _start(cursor, len(found))
    stop = start + limit
    return Page(tuple(found[start:stop]), str(stop) if stop < len(found) else None)


def _read(document: bytes) -> list[KeyVerdict]:
    rows = json.loads(zlib.decompress(document))
    return [KeyVerdict(key, use, role, tuple(modules), note) for key, use, role, modules, note in rows]


def _told(manifest: AdapterManifest) -> list[KeyVerdict]:
    found = []
    for module in manifest.modules:
        named = {"lora_A": module.a_key, "lora_B": module.b_key, "block": module.block_key, "bias": module.bias_key}
        found += [KeyVerdict(key, "used", role, (module.path,)) for role, key in named.items() if key]
    return found + [KeyVerdict(entry.key, "ignored", note=entry.reason) for entry in manifest.report.ignored]


def _start(cursor: str | None, count: int) -> int:
    if cursor is None:
        return 0
    if not cursor.isascii() or not cursor.isdigit() or len(cursor) > 9 or int(cursor) >= max(count, 1):
        problem = "is no cursor of this list"
        raise RequestInvalid(f"The cursor {problem}.", errors=[FieldError("/query/cursor", problem)])
    return int(cursor)
