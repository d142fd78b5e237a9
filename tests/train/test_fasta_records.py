"""FASTA: headers of several sources, records that are not valid, and what the tasks make of the columns."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import FileBroken, TooLarge
from train.rows import Limits, find_format, inspect, iter_rows

GENCODE = "ENST1.5|ENSG7.1|OTTHUMG1|OTTHUMT1|MAGI2-AS3-215|MAGI2-AS3|18|"


def written(folder: Path, text: str, name: str = "t.fa") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("T1", ("T1", "", None, None)),
        ("T1\tan lncRNA gene=G7 label=lncRNA", ("T1", "an lncRNA gene=G7 label=lncRNA", "lncRNA", "G7")),
        (
            "ENST1.5 cdna chromosome:GRCh38:7 gene:ENSG7.1 gene_biotype:protein_coding transcript_biotype:lncRNA",
            ("ENST1.5", "cdna chromosome:GRCh38:7 gene:ENSG7.1 gene_biotype:protein_coding transcript_biotype:lncRNA",
             "lncRNA", "ENSG7.1"),
        ),
        (f"{GENCODE} <unknown description>", ("ENST1.5", "<unknown description>", None, "ENSG7.1")),
        (f"{GENCODE}lncRNA|", ("ENST1.5", "", "lncRNA", "ENSG7.1")),
        (f"{GENCODE}retained_intron| label=0", ("ENST1.5", "label=0", "0", "ENSG7.1")),
        ("lcl|NM_1.2 [gene=ABC] [label=mRNA]", ("lcl|NM_1.2", "[gene=ABC] [label=mRNA]", "mRNA", "ABC")),
    ],
)  # fmt: skip
def test_what_a_header_tells(tmp_path: Path, header: str, row: tuple[str | None, ...]) -> None:
    path = written(tmp_path, f">{header}\nACGU\n\nNNacg\n")
    (found,) = iter_rows(path, "fasta")
    assert tuple(found[name] for name in ("id", "description", "label", "gene")) == row
    assert found["sequence"] == "ACGUNNacg"


@pytest.mark.parametrize("name", ["x.fa", "x.FASTA", "x.fna", "x.fa.gz", "x.txt", "x.gz"])
def test_a_file_is_known_by_its_name_or_its_first_letter(tmp_path: Path, name: str) -> None:
    assert find_format(written(tmp_path, ">a label=lncRNA\nACGT\n", name), name) == "fasta"


def test_what_a_file_can_serve(tmp_path: Path) -> None:
    path = written(tmp_path, ">a label=lncRNA\nACGT\n>b label=mRNA\nACGA\n", "x.fa.gz")
    info = inspect(path, "fasta")
    assert [column.name for column in info.columns] == ["id", "description", "sequence", "label", "gene"]
    usable = {task.task: task.reason for task in info.tasks if task.form == "sequence-label"}
    assert usable == {"transcript-classification": None}
    for text, reason in (
        (">a label=lncRNA\nACGT\n>b label=lncRNA\nACGA\n", "nothing to tell apart"),
        (">a label=lncRNA\nACGT\n>b\nACGA\n", "row 2: `label` is missing or null"),
    ):
        (verdict,) = [item for item in inspect(written(tmp_path, text), "fasta").tasks if item.form == "sequence-label"]
        assert not verdict.usable
        assert reason in str(verdict.reason)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ACGT\n>a\nACGT\n", "Line 1 stands before the first header"),
        (">a\nACGT\n>b\nAC9T\n", "row 2: line 4: '9' is no letter of a sequence"),
        (">a\n>b\nACGT\n", "row 1: line 1: the record 'a' has no sequence"),
        (">\nACGT\n", "row 1: line 1: the record has no name"),
        (">a\nACGT\n>b\n" + "A" * 200 + "\n>c\nAC\n", "row 2: line 3: is over the limit of 100 bytes"),
        (">a\nACGT\n>b\n" + ("A" * 60 + "\n") * 2, "row 2: line 3: is over the limit of 100 bytes"),
        (">" + "h" * 200 + "\nACGT\n>c\nAC\n", "row 1: line 1: is over the limit of 100 bytes"),
        ("\n\n", "The file has no rows"),
    ],
)
def test_what_is_not_valid_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(FileBroken) as caught:
        inspect(written(tmp_path, text), "fasta", Limits(max_row_bytes=100))
    assert words in str(caught.value)


def test_letters_that_are_no_utf8_a_bomb_and_a_cut_off_archive(tmp_path: Path) -> None:
    (tmp_path / "x.fa").write_bytes(b">a\nAC\xe9T\n")
    with pytest.raises(FileBroken, match="row 1: line 2: byte 0xe9"):
        inspect(tmp_path / "x.fa", "fasta")
    bomb = written(tmp_path, ">a\n" + "A\n" * 100_000, "b.fa.gz")
    with pytest.raises(TooLarge):
        inspect(bomb, "fasta", Limits(max_bytes=1000))
    bomb.write_bytes(bomb.read_bytes()[:-9])
    with pytest.raises(FileBroken, match="cut off or damaged"):
        inspect(bomb, "fasta")


NAMES = st.text("abcXYZ019|.:_-", min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.text("ACGTUNacgtun", min_size=1, max_size=40)), min_size=1), st.integers(1, 15))
def test_records_come_back_whatever_the_lines_are(records: list[tuple[str, str]], width: int) -> None:
    from train.records import FirstFault
    from train.rows import read_rows

    text = "".join(
        f">{name} x\r\n" + "".join(f"{sequence[at : at + width]}\r\n" for at in range(0, len(sequence), width))
        for name, sequence in records
    )
    found = list(read_rows(io.BytesIO(text.encode()), "fasta", Limits(), FirstFault()))
    assert [number for number, _ in found] == list(range(1, len(records) + 1))
    assert [row["sequence"] for _, row in found] == [sequence for _, sequence in records]
    behind = list(read_rows(io.BytesIO(text.encode()), "fasta", Limits(), FirstFault(), skip=1))
    assert behind == found[1:]
