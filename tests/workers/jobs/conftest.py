from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train"))

from tiny_base import sums, write_rows, write_tiny_base

from artifacts.base_model import inspect_base
from artifacts.content import file_sha256
from storage import datasets, models
from storage.blobs import BlobStore


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def train_pool(pool: Any, torch_provider: Any) -> Any:
    pool.provider = torch_provider
    return pool


@pytest.fixture
def base_id(train_pool: Any, tiny_base: Path) -> str:
    """The tiny model, registered."""
    with train_pool.database.write() as session:
        return models.add_model(session, inspect_base(tiny_base))[0].id


@pytest.fixture
def add_dataset(train_pool: Any) -> Callable[..., str]:
    """Stores rows as JSON Lines; returns the dataset's id."""

    def add(rows: list[dict[str, Any]] | None = None, name: str = "sums") -> str:
        found = sums() if rows is None else rows
        path = write_rows(train_pool.folder / f"{name}.jsonl", found)
        digest = file_sha256(path)
        BlobStore(train_pool.settings().blob_url).put_file(path, digest)
        with train_pool.database.write() as session:
            row, added = datasets.add_dataset(
                session,
                name=name,
                format="jsonl",
                sha256=digest,
                size=path.stat().st_size,
                rows=len(found),
                columns=[],
            )
        assert added
        return row.id

    return add
