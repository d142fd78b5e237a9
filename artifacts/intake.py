"""The way in: from files of a stranger to a directory that holds one adapter, and from that to its manifest."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from artifacts.bone_names import modernise
from artifacts.content import ContentScan, file_sha256, identity_digest, scan
from artifacts.errors import DiskFull
from artifacts.formats.gguf import BASE_CONFIG
from artifacts.gguf_file import is_gguf
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, AdapterLayout, parse_json, read_json, read_layout
from artifacts.manifest import AdapterManifest, FileEntry, IgnoredKey, IntakeReport, NestedRanks
from artifacts.nested_ranks import METHOD, nested_ranks
from artifacts.numbered_layers import name_layers
from artifacts.upload import MAX_FILES, IntakeLimits, pieces_of, role_of, sort

__all__ = ["MAX_FILES", "IntakeLimits", "inspect", "media_type", "receive"]

MAX_WARNINGS = 50

_MEDIA_TYPES = {".safetensors": "application/vnd.safetensors", ".json": "application/json", ".md": "text/markdown"}


def receive(
    files: Sequence[tuple[str, Path]],
    workdir: Path,
    limits: IntakeLimits,
    *,
    digests: Mapping[Path, str] | None = None,
    base_config: Mapping[str, Any] | None = None,
) -> Path:
    """Bring an upload into a new directory `workdir`/adapter that holds exactly the files of one adapter.

    Args:
        files: (name that the client gave, staged path): one safetensors or GGUF file or archive, or the files of a PEFT
            directory. The names decide what a file is for; on disk they are replaced by names of our own.
        workdir: a folder for this upload alone; it is made if need be. Staged files are linked, or copied, from where
            they are, and not changed.
        digests: staged path → SHA-256 (hex), of files that were hashed on their way here; `inspect` will not hash
            these again.
        base_config: config.json of the base model, where it is known; one among the files counts more.

    Returns:
        the directory. What was left out of it, and what is known of it, is written beside it, where `inspect` reads it.

    Raises:
        FormatUnknown, PickleRefused, ArchiveRefused, TooLarge: as said there; nothing is left behind in `workdir`.
        FileBroken, ConfigRefused: as `artifacts.gguf_intake.unpack_gguf`.
        DiskFull: no space.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    directory, unpacked = workdir / "adapter", workdir / "unpacked"
    try:
        directory.mkdir()
        kept, dropped = sort(pieces_of(files, unpacked, limits))
        for name, path in kept.items():
            _place(path, directory / name)
        changes = _from_gguf(directory, base_config, limits.max_bytes) or modernise(directory) or name_layers(directory)
        known = {name: digests[path] for name, path in kept.items() if digests and path in digests}
        if changes:
            known = {name: digest for name, digest in known.items() if name not in (WEIGHTS_NAME, CONFIG_NAME)}
        _write_notes(directory, _Notes(tuple(dropped), known, changes))
    except OSError as error:
        _discard(directory)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                "There is no space left to take the upload in.", hint="Free space, then try again."
            ) from error
        raise
    except BaseException:
        _discard(directory)
        raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return directory


def _from_gguf(directory: Path, base_config: Mapping[str, Any] | None, max_bytes: int) -> tuple[str, ...]:
    if not is_gguf(directory / WEIGHTS_NAME):
        return ()
    from artifacts.gguf_intake import unpack_gguf

    sent = directory / BASE_CONFIG
    return unpack_gguf(directory, read_json(sent) if sent.is_file() else base_config, max_bytes)


def inspect(directory: Path, *, base_model: str | None = None) -> AdapterManifest:
    """Describe the adapter in `directory`, or in one safetensors file, without loading a tensor.

    Every byte is read once, in buffers, for the digests and for the count of NaN and Inf.

    Args:
        base_model: the base as the uploader names it; it counts more than what the configuration says.

    Raises:
        FileBroken, ConfigRefused, FormatUnknown, PickleRefused: as `artifacts.layout.read_layout`.
    """
    notes = _read_notes(directory)
    layout = read_layout(directory)
    content = scan(layout.weights_path, layout.header, sha256=notes.sha256.get(layout.weights_path.name))
    config, modules, nested = layout.config, layout.modules, nested_ranks(layout)
    tensors = layout.header.tensors.values()
    elements: Counter[str] = Counter()
    for info in tensors:
        elements[info.dtype] += info.elements
    targets = {module.path.rpartition(".")[2] for module in modules} or set(config.target_modules)
    refusals = layout.refusals
    return AdapterManifest(
        format=layout.format,
        method=config.method if nested is None else METHOD,
        base_model=base_model or config.base_model,
        base_model_revision=config.revision if base_model in (None, config.base_model) else None,
        rank=max((module.rank for module in modules), default=config.rank),
        alpha=config.alpha,
        target_modules=tuple(sorted(targets)),
        parameter_count=sum(elements.values()),
        dtype=elements.most_common(1)[0][0],
        files=_file_entries(directory, {**notes.sha256, layout.weights_path.name: content.sha256}),
        modules=modules,
        mergeable=not refusals,
        refusal="; ".join(refusals) or None,
        weights_digest=content.weights_digest,
        identity_digest=identity_digest(content.weights_digest, layout.configs, modules, nested),
        config=layout.document,
        report=_report(layout, content, notes, nested),
        keys=layout.verdicts,
    )


def _report(layout: AdapterLayout, content: ContentScan, notes: _Notes, nested: NestedRanks | None) -> IntakeReport:
    warnings = [*notes.changes, *layout.match.warnings]
    if content.nonfinite:
        count = sum(content.nonfinite.values())
        warnings.append(f"{count} elements of {len(content.nonfinite)} tensors are NaN or Inf.")
    dead = [module for module in layout.modules if content.zero & set(module.factor_keys)]
    if dead and len(dead) == len(layout.modules):
        warnings.append("ΔW is zero in every module: the adapter changes nothing. Was it saved before training?")
    elif dead:
        warnings.append(f"ΔW is zero in {len(dead)} of {len(layout.modules)} modules, for instance {dead[0].path!r}.")
    if len(warnings) > MAX_WARNINGS:
        warnings[MAX_WARNINGS:] = [f"… and {len(warnings) - MAX_WARNINGS} more warnings."]
    return IntakeReport(
        used_keys=len(layout.match.used),
        ignored=layout.match.ignored,
        nonfinite=content.nonfinite,
        dropped_files=notes.dropped,
        warnings=tuple(warnings),
        nested=nested,
        facts=layout.facts,
    )


def _file_entries(directory: Path, known: Mapping[str, str]) -> tuple[FileEntry, ...]:
    paths = [directory]
    if directory.is_dir():
        paths = sorted(entry for entry in directory.iterdir() if entry.is_file() and role_of(PurePosixPath(entry.name)))
    return tuple(
        FileEntry(path.name, known.get(path.name) or file_sha256(path), path.stat().st_size, media_type(path.name))
        for path in paths
    )


def media_type(name: str) -> str:
    """The media type of an adapter's file, by its name."""
    return _MEDIA_TYPES.get(PurePosixPath(name).suffix.lower(), "application/octet-stream")


def _place(source: Path, target: Path) -> None:
    """Give the bytes a second name: no copy on one file system, and the staged file stays its owner's."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copyfile(source, target)


@dataclass(frozen=True, slots=True)
class _Notes:
    """What `receive` tells `inspect` about a directory: files left out, digests known already, what it changed."""

    dropped: tuple[IgnoredKey, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


def _notes_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.notes.json")


def _write_notes(directory: Path, notes: _Notes) -> None:
    document = {
        "dropped": {entry.key: entry.reason for entry in notes.dropped},
        "sha256": dict(notes.sha256),
        "changes": list(notes.changes),
    }
    _notes_path(directory).write_text(json.dumps(document), encoding="utf-8")


def _read_notes(directory: Path) -> _Notes:
    path = _notes_path(directory)
    if not directory.is_dir() or not path.is_file():
        return _Notes()
    document = parse_json(path.read_text(encoding="utf-8"), path.name)
    dropped = tuple(IgnoredKey(key, reason) for key, reason in document["dropped"].items())
    return _Notes(dropped, document["sha256"], tuple(document["changes"]))


def _discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    _notes_path(directory).unlink(missing_ok=True)
