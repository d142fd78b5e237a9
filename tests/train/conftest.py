from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_base import write_tiny_base

    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_base import write_tiny_encoder

    return write_tiny_encoder(tmp_path_factory.mktemp("tiny-encoder"))


@pytest.fixture
def encoder_trainings(tiny_encoder: Path, tmp_path: Path) -> object:
    """Makes small trainings of a base model that is an encoder."""
    from trainings import Trainings

    return Trainings(tmp_path, tiny_encoder)


@pytest.fixture
def trainings(tiny_base: Path, tmp_path: Path) -> object:
    """Makes small trainings (`trainings.Trainings`)."""
    from trainings import Trainings

    return Trainings(tmp_path, tiny_base)


@pytest.fixture(scope="session")
def smollm2() -> object:
    """The first two layers of SmolLM2, which a test copies before it changes them, and tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from examples.smollm2.base_model import base_model_directory

    directory = base_model_directory()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.requires_grad_(False).eval()
    model.name_or_path = "acme/smollm2"
    rows = [f"Code of item {number}: <{number * 7 % 97:02d}-ok>" for number in range(10, 18)]
    return model, tokenizer(rows, return_tensors="pt", padding=True).input_ids


@pytest.fixture(scope="session")
def tiny_kmer_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transcript_rows import write_tiny_kmer_bert

    return write_tiny_kmer_bert(tmp_path_factory.mktemp("tiny-kmer-bert") / "base")


@pytest.fixture
def transcript_trainings(tiny_kmer_bert: Path, tmp_path: Path) -> object:
    """Makes small trainings of a BERT of k-mers, on 60 transcripts."""
    from trainings import Trainings
    from transcript_rows import transcripts, write_fasta

    from train.data import DataFile

    made = Trainings(tmp_path, tiny_kmer_bert)
    made.data = DataFile(write_fasta(tmp_path / "transcripts.fa", transcripts()), "fasta")
    return made
