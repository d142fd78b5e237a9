"""The files of an adapter as they are sent elsewhere: those of its download, on disk, with a card that tells of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from storage.blobs import BlobStore
from storage.downloads import Download
from storage.segments import Segment, read_segments, total_size
from storage.tables import AdapterRow

CARD_NAME = "README.md"
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?")
"""What else an adapter may name as its base model is a path of somebody's machine, which is nobody else's business."""
Tell = Callable[[int, int | None], None]
"""Given the bytes that are done and all of them; raises to stop."""


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file that is to be sent: its name there, where it lies, SHA-256 (hex) and size."""

    name: str
    path: Path
    sha256: str
    size: int


def write_files(blobs: BlobStore, download: Download, card: str, folder: Path, tell: Tell) -> tuple[PushedFile, ...]:
    """The members of the download, or the one file that it is, in the new `folder`; `card` unless it has one.

    Raises:
        BlobMissing, BlobCorrupt, BlobStoreUnavailable: the stored bytes can not be had.
    """
    folder.mkdir(parents=True)
    parts: list[tuple[str, Sequence[Segment]]] = [(item.name, item.content) for item in download.members]
    parts = parts or [(download.file_name, download.segments)]
    if all(name != CARD_NAME for name, _ in parts):
        parts.append((CARD_NAME, (card.encode(),)))
    total = sum(total_size(segments) for _, segments in parts)
    done = 0
    found = []
    for number, (name, segments) in enumerate(sorted(parts, key=lambda part: part[0])):
        path, digest, size = folder / f"file-{number:04d}", hashlib.sha256(), total_size(segments)
        with path.open("wb") as file:
            for chunk in read_segments(blobs, segments, 0, size):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                tell(done, total)
        found.append(PushedFile(name, path, digest.hexdigest(), size))
    return tuple(found)


def card_of(row: AdapterRow, layout: str) -> str:
    """What a hub shows of an adapter: base model and kind for its search, and where the adapter came from."""
    facts: dict[str, object] = {"library_name": "peft" if layout == "peft" else "diffusers", "tags": ["lora"]}
    if layout not in ("peft", "diffusers"):
        del facts["library_name"]
    if row.base_model is not None and _HUB_NAME.fullmatch(row.base_model):
        facts["base_model"] = row.base_model
        facts["base_model_relation"] = "adapter"
    lines = [
        f"# {row.name}",
        row.description,
        f"Method `{row.method}`, rank {row.rank}, {row.module_count} modules, {row.parameter_count:,} parameters.",
        f"Weights digest `{row.weights_digest}` (`{row.id}`, origin: {row.origin}).",
    ]
    head = yaml.safe_dump(facts, sort_keys=True, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(line for line in lines if line) + "\n"
