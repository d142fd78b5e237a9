"""The files of an adapter as they are sent elsewhere: those of its download, on disk, with a card that tells of it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from artifacts.content import file_sha256
from artifacts.public_names import is_path, public_metadata, public_name
from artifacts.safetensors_header import packed_header, read_header
from storage.blobs import BlobStore
from storage.downloads import Download
from storage.segments import Segment, read_segments, total_size
from storage.tables import AdapterRow

CARD_NAME = "README.md"
SHORTEST_FOLDER = 4
"""Characters of a folder's name that is looked for in a text: "." and "../" stand in many."""
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


def write_files(
    blobs: BlobStore, row: AdapterRow, download: Download, layout: str, folder: Path, tell: Tell
) -> tuple[PushedFile, ...]:
    """The members of the download, or the one file that it is, in the new `folder`, with a card unless there is one.

    Where the weights' header or the card names a folder as the base model, they are told otherwise.

    Raises:
        BlobMissing, BlobCorrupt, BlobStoreUnavailable: the stored bytes can not be had.
    """
    folder.mkdir(parents=True)
    parts: list[tuple[str, Sequence[Segment]]] = [(item.name, item.content) for item in download.members]
    parts = parts or [(download.file_name, download.segments)]
    if all(name != CARD_NAME for name, _ in parts):
        parts.append((CARD_NAME, (card_of(row, layout).encode(),)))
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
        if _renamed_base(name, path, row):
            found.append(PushedFile(name, path, file_sha256(path), path.stat().st_size))
        else:
            found.append(PushedFile(name, path, digest.hexdigest(), size))
    return tuple(found)


def _renamed_base(name: str, path: Path, row: AdapterRow) -> bool:
    """Write the file anew if it names a folder as its base model; whether it did."""
    if name == CARD_NAME:
        return _renamed_in_card(path, row)
    if not name.endswith(".safetensors"):
        return False
    header = read_header(path)
    metadata = public_metadata(header.metadata, row.base_model)
    if metadata is header.metadata:
        return False
    written = path.with_suffix(".renamed")
    with path.open("rb") as source, written.open("wb") as target:
        document = json.loads(source.read(header.data_start)[8:])
        target.write(packed_header({**document, "__metadata__": dict(metadata)}))
        shutil.copyfileobj(source, target)
    written.replace(path)
    return True


def _renamed_in_card(path: Path, row: AdapterRow) -> bool:
    """PEFT writes the folder that a model was loaded from into the card too."""
    folder = row.config.get("base_model_name_or_path")
    if not isinstance(folder, str) or len(folder) < SHORTEST_FOLDER or not is_path(folder):
        return False
    text, other = path.read_bytes(), (public_name(row.base_model) or "").encode()
    if folder.encode() not in text:
        return False
    path.write_bytes(text.replace(folder.encode(), other))
    return True


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
