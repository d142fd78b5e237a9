"""What an upload's files are: which belong to the adapter, under what name they are kept, and which are left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from artifacts import archives
from artifacts.archives import ArchiveLimits
from artifacts.errors import ArchiveRefused, FileBroken, FormatUnknown, PickleRefused, TooLarge
from artifacts.formats.gguf import BASE_CONFIG
from artifacts.gguf_file import is_gguf
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, is_pickle_name
from artifacts.manifest import IgnoredKey
from artifacts.safetensors_header import looks_like_safetensors

MAX_FILES = 200
_WEIGHTS = (".safetensors", ".gguf")
STATE_WEIGHTS = "model.safetensors"
_STATE = frozenset({"train_state.json", "optimizer.bin", "scheduler.bin"})
"""What accelerate writes beside the weights of a training that can go on."""
_MAX_COMPANION_BYTES = 64 * 1024 * 1024

COMPANIONS = frozenset(
    {
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "LICENSE.md",
        "NOTICE",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "new_embeddings.safetensors",
        "params.json",
        BASE_CONFIG,
    }
)
"""Files that may accompany an adapter and are kept with it under these names."""


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds of one upload: bytes after unpacking, entries of an archive, and bytes out per byte in."""

    max_bytes: int = 8 * 1024**3
    max_entries: int = 1000
    max_ratio: float = 20.0

    @property
    def archive(self) -> ArchiveLimits:
        return ArchiveLimits(self.max_bytes, self.max_entries, self.max_ratio)


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of an upload: its cleaned path, and where its bytes are."""

    name: PurePosixPath
    path: Path


def pieces_of(files: Sequence[tuple[str, Path]], unpacked: Path, limits: IntakeLimits) -> list[Piece]:
    """The upload's files; an archive that was sent alone is unpacked first."""
    if not files:
        raise FormatUnknown("No file was sent.")
    if len(files) > MAX_FILES:
        raise TooLarge(f"{len(files)} files were sent; at most {MAX_FILES} are accepted. Send an archive.")
    if sum(path.stat().st_size for _, path in files) > limits.max_bytes:
        raise TooLarge(f"The upload has more than {limits.max_bytes} bytes.")
    kinds = [archives.archive_kind(path) if path.stat().st_size else None for _, path in files]
    if len(files) == 1 and kinds[0] is not None:
        unpacked.mkdir()
        dropped: list[str] = []

        def wanted(name: str) -> bool:
            keep = role_of(PurePosixPath(name)) is not None
            if not keep:
                dropped.append(name)
            return keep

        written = archives.unpack(files[0][1], unpacked, limits.archive, wanted=wanted)
        pieces = [Piece(PurePosixPath(path.relative_to(unpacked).as_posix()), path) for path in written]
        return pieces + [Piece(PurePosixPath(name), Path()) for name in dropped]
    for (name, path), kind in zip(files, kinds, strict=True):
        if kind is not None and role_of(_clean(name)) is not None:
            _refuse_checkpoint(path, kind)
            raise ArchiveRefused(
                f"{_clean(name).name!r} is an archive among several files.", hint="Send the archive alone."
            )
    pieces = [Piece(_clean(name), path) for name, path in files]
    return [_single(pieces[0])] if len(pieces) == 1 else pieces


def _refuse_checkpoint(path: Path, kind: str) -> None:
    """Raises PickleRefused when a zip among several files is a PyTorch checkpoint."""
    with path.open("rb") as file:
        if kind == "zip" and b"data.pkl" in file.read(4096):
            raise PickleRefused("One of the files is a PyTorch checkpoint, which is a pickle.", hint=_SAFE_HINT)


_SAFE_HINT = "Load the adapter in PEFT and save it with safe_serialization=True to get a safetensors file."


def _single(piece: Piece) -> Piece:
    """A file that was sent alone is judged by its first bytes, whatever its name."""
    _refuse_shards([piece.name.name])
    if _is_read(piece.path) or piece.name.suffix.lower() == ".safetensors":
        return Piece(PurePosixPath(WEIGHTS_NAME), piece.path)
    if is_pickle_name(piece.name.name):
        raise PickleRefused(f"{piece.name.name!r} would have to be loaded as a pickle.", hint=_SAFE_HINT)
    raise FormatUnknown(
        f"{piece.name.name!r} is neither a safetensors nor a GGUF file, nor a zip, tar or tar.gz archive.",
        hint="Send adapter_model.safetensors together with adapter_config.json, or an archive of both.",
    )


def _is_read(path: Path) -> bool:
    """Whether the first bytes are those of a safetensors or GGUF file.

    Raises:
        PickleRefused: they are those of a pickle.
    """
    with path.open("rb") as file:
        start = file.read(16)
    if looks_like_safetensors(start) or is_gguf(path):
        return True
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise PickleRefused("The weights are a pickle, which is never loaded here.", hint=_SAFE_HINT)
    return False


def _clean(name: str) -> PurePosixPath:
    """A client's file name, without anything that could lead somewhere. It is never used on disk."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    printable = ["".join(character if character.isprintable() else "?" for character in part) for part in parts]
    return PurePosixPath(*printable[-8:]) if printable else PurePosixPath("unnamed")


def role_of(name: PurePosixPath) -> str | None:
    """The name under which a file is kept: its own if it is one of ours; None when it is no part of an adapter."""
    if name.name.startswith("._") or "__MACOSX" in name.parts:
        return None
    if name.name in (WEIGHTS_NAME, CONFIG_NAME) or name.name in COMPANIONS:
        return name.name
    return name.name if name.suffix.lower() in _WEIGHTS else None


def sort(pieces: list[Piece]) -> tuple[dict[str, Path], list[IgnoredKey]]:
    """(files to keep by their name, what is left out with the reason)."""
    folder = _adapter_folder(pieces)
    here = {piece.name.name: piece.path for piece in pieces if piece.name.parent == folder and role_of(piece.name)}
    if len(here) != sum(piece.name.parent == folder and role_of(piece.name) is not None for piece in pieces):
        raise FileBroken("Two of the files have the same name.")
    with_state = any(piece.name.parent == folder and piece.name.name in _STATE for piece in pieces)
    kept: dict[str, Path] = {WEIGHTS_NAME: here[_weights_name(here, with_state)]}
    _is_read(kept[WEIGHTS_NAME])
    for name in (CONFIG_NAME, *sorted(COMPANIONS)):
        if name in here:
            kept[name] = here[name]
    for name, path in kept.items():
        if name != WEIGHTS_NAME and path.stat().st_size > _MAX_COMPANION_BYTES and name != "new_embeddings.safetensors":
            raise TooLarge(f"{name} has {path.stat().st_size} bytes; at most {_MAX_COMPANION_BYTES} are accepted.")
    taken = set(kept.values())
    dropped = [IgnoredKey(str(piece.name), _reason(piece.name, folder)) for piece in pieces if piece.path not in taken]
    return kept, sorted(dropped, key=lambda entry: entry.key)


_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")


def _refuse_shards(names: Sequence[str]) -> None:
    """Raises FormatUnknown: one of these is a part of weights that are cut into several files."""
    shards = sorted(name for name in names if (found := _SHARD.search(name)) is not None and int(found[1]) > 1)
    if shards:
        raise FormatUnknown(
            f"The weights are cut into several files, of which {len(shards)} came: {', '.join(shards[:20])}.",
            hint=f"Join them into one {WEIGHTS_NAME}: load the adapter and save it with a larger max_shard_size.",
        )


def _reason(name: PurePosixPath, folder: PurePosixPath) -> str:
    if is_pickle_name(name.name):
        return "a pickle; never opened"
    if name.name == STATE_WEIGHTS and name.parent == folder:
        return "the state of a training, beside what was saved of it"
    if name.parent != folder and role_of(name) is not None:
        return "in another folder than the adapter"
    if is_weights(name):
        return f"other weights than {WEIGHTS_NAME}, which was taken"
    return "not part of an adapter"


def _adapter_folder(pieces: list[Piece]) -> PurePosixPath:
    """The folder that holds the adapter: the only one with weights, or the one above all others that have some."""
    folders = sorted(
        {piece.name.parent for piece in pieces if is_weights(piece.name)},
        key=lambda item: (len(item.parts), str(item)),
    )
    if not folders:
        raise _no_weights(pieces)
    outermost = folders[0]
    if any(not other.is_relative_to(outermost) for other in folders):
        names = ", ".join(str(folder) for folder in folders[:20])
        raise ArchiveRefused(f"Several adapters are in the upload, in {names}.", hint="Send one adapter at a time.")
    return outermost


def is_weights(name: PurePosixPath) -> bool:
    """Whether it is the name of a file of factors."""
    return role_of(name) is not None and name.suffix.lower() in _WEIGHTS and name.name not in COMPANIONS


def _weights_name(here: dict[str, Path], with_state: bool) -> str:
    names = [name for name in here if is_weights(PurePosixPath(name))]
    if WEIGHTS_NAME not in names:
        _refuse_shards(names)
    if with_state and len(names) > 1:
        names = [name for name in names if name != STATE_WEIGHTS]
    if WEIGHTS_NAME in names or len(names) == 1:
        return WEIGHTS_NAME if WEIGHTS_NAME in names else names[0]
    raise FormatUnknown(
        f"Several files of weights and none is called {WEIGHTS_NAME}: {', '.join(sorted(names)[:20])}.",
        hint="Send one adapter at a time.",
    )


def _no_weights(pieces: list[Piece]) -> PickleRefused | FormatUnknown:
    names = sorted(str(piece.name) for piece in pieces)
    pickles = [name for name in names if is_pickle_name(name)]
    if pickles:
        return PickleRefused(
            f"There is no safetensors file, only pickles: {', '.join(pickles[:20])}; they are never loaded here.",
            hint=_SAFE_HINT,
        )
    if any(name.endswith(".distcp") for name in names):
        return FormatUnknown(
            "There are only shards of a distributed checkpoint.",
            hint="Consolidate it (accelerate merge-weights) and save the adapter with PEFT.",
        )
    return FormatUnknown(
        f"There is no {WEIGHTS_NAME} among {', '.join(names[:20])}.",
        hint="Send the files that PEFT's save_pretrained writes.",
    )
