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
