"""FASTA: records of a header that begins with > and a sequence on the lines below it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from artifacts.errors import FileBroken
from train.records import Faults, Limits, Row
from train.text_lines import decode, lines, too_long

COLUMNS = ("id", "description", "sequence", "label", "gene")

_MARK = b">"
_LETTERS = re.compile(r"[A-Za-z*\-]*")
_WORD = re.compile(r"\[?([A-Za-z_]+)[=:]([^\s\]]+)\]?")
_LABELS = ("label", "transcript_biotype", "gene_biotype")
_GENCODE_FIELDS = 8
"""Of a header of GENCODE: transcript|gene|havana gene|havana transcript|name|gene's name|length|biotype."""


@dataclass(slots=True)
class _Record:
    """A record while its lines go by; `fault` is the first thing that is wrong with it."""

    line: int
    header: str
    sequence: list[str] = field(default_factory=list)
    size: int = 0
    fault: str | None = None

    def add(self, number: int, raw: bytes, *, whole: bool, limits: Limits) -> None:
        self.size += len(raw)
        if self.fault is not None:
            return
        if not whole or self.size > limits.max_row_bytes:
            self.fault = f"line {self.line}: {too_long(limits)}"
            return
        try:
            text = "".join(decode(raw).split())
        except ValueError as error:
            self.fault = f"line {number}: {error}"
            return
        bad = text[_end(text) :]
        if bad:
            self.fault = f"line {number}: {bad[0]!r} is no letter of a sequence"
        self.sequence.append(text)

    def row(self) -> Row:
        """Raises ValueError, which says what is wrong."""
        if self.fault is not None:
            raise ValueError(self.fault)
        name, description = (*self.header.split(None, 1), "", "")[:2]
        if not name:
            raise ValueError(f"line {self.line}: the record has no name")
        sequence = "".join(self.sequence)
        if not sequence:
            raise ValueError(f"line {self.line}: the record {name[:80]!r} has no sequence")
        parts = name.split("|")
        told = _told(description)
        gencode = parts if len(parts) >= _GENCODE_FIELDS else []
        label = next((told[key] for key in _LABELS if key in told), None)
        return {
            "id": parts[0] if gencode else name,
            "description": description,
            "sequence": sequence,
            "label": label or (gencode[_GENCODE_FIELDS - 1] if gencode else None) or None,
            "gene": told.get("gene") or (gencode[1] if gencode else None) or None,
        }


def read(file: BinaryIO, limits: Limits, faults: Faults) -> Iterator[tuple[int, Row]]:
    """The records with their numbers; those that are not valid go to `faults`. Empty lines say nothing.

    A row has `id` (the header's first word), `description` (the rest of it), `sequence` as it is written, and, from
    words such as `label=lncRNA` and `gene=G7`, from those of Ensembl (`gene:…`, `transcript_biotype:…`,
    `gene_biotype:…`) or from the fields of GENCODE, `label` and `gene`; null where the header does not tell.

    Raises:
        FileBroken: the whole file is no FASTA.
        TooLarge: see `lines`.
    """
    number = 0
    record: _Record | None = None
    for line in lines(file, limits):
        if line.raw.startswith(_MARK):
            if record is not None:
                number += 1
                yield from _finished(number, record, faults)
            record = _begun(line.number, line.raw, whole=line.whole, limits=limits)
        elif record is not None:
            record.add(line.number, line.raw, whole=line.whole, limits=limits)
        elif line.raw.strip():
            raise FileBroken(
                f"Line {line.number} stands before the first header.",
                hint="A FASTA file begins with a line of > and a name.",
            )
    if record is not None:
        yield from _finished(number + 1, record, faults)


def _begun(number: int, raw: bytes, *, whole: bool, limits: Limits) -> _Record:
    record = _Record(number, "", size=len(raw))
    if not whole:
        record.fault = f"line {number}: {too_long(limits)}"
        return record
    try:
        record.header = decode(raw[1:]).strip()
    except ValueError as error:
        record.fault = f"line {number}: {error}"
    return record


def _finished(number: int, record: _Record, faults: Faults) -> Iterator[tuple[int, Row]]:
    try:
        row = record.row()
    except ValueError as error:
        faults.add(number, str(error))
    else:
        yield number, row


def _told(description: str) -> Mapping[str, str]:
    """The pairs of a description, such as gene=G7, gene:G7 or [gene=G7]; of a name that is there twice the first."""
    found: dict[str, str] = {}
    for word in description.split():
        match = _WORD.fullmatch(word)
        if match is not None:
            found.setdefault(match[1], match[2])
    return found


def _end(text: str) -> int:
    """Where what is no letter of a sequence begins."""
    match = _LETTERS.match(text)
    return 0 if match is None else match.end()
