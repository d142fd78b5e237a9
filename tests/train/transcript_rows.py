"""A tiny BERT of k-mers, and transcripts that it can learn to tell apart in seconds."""

from __future__ import annotations

import random
from pathlib import Path

from train.kmer_bert import KmerBertShape, write_kmer_bert

SHAPE = KmerBertShape(layers=1, width=32, heads=2, inner=48, positions=128, dropout=0.1)
TASK = {"type": "transcript-classification", "max_length": 128, "minimum_length": 30}


def write_tiny_kmer_bert(directory: Path) -> Path:
    write_kmer_bert(directory, SHAPE, seed=0)
    return directory


def transcripts(count: int = 60, seed: int = 0) -> list[tuple[str, str]]:
    """(header, sequence): coding ones have a reading frame of GCN codons, the others are of A and T."""
    drawn = random.Random(seed)
    found = []
    for number in range(count):
        coding = number % 2 == 0
        length = drawn.randrange(20, 40)
        if coding:
            body = "".join("GC" + drawn.choice("ACGT") for _ in range(length))
            sequence = f"{drawn.choice(['CC', 'GAC', ''])}ATG{body}TAA"
        else:
            sequence = "ATG" + "".join(drawn.choice("AAT") + drawn.choice("ACT") + "T" for _ in range(length))
        label = "protein_coding" if coding else "lncRNA"
        found.append((f"T{number} gene=G{number // 2 if number < 8 else number} label={label}", sequence))
    return found


def fasta(records: list[tuple[str, str]]) -> bytes:
    return "".join(f">{header}\n{sequence}\n" for header, sequence in records).encode()


def write_fasta(path: Path, records: list[tuple[str, str]]) -> Path:
    path.write_bytes(fasta(records))
    return path
