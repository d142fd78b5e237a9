from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "train"))
sys.path.insert(0, str(Path(__file__).parent.parent.parent / "storage"))

from s3_server import s3_bucket, s3_endpoint  # noqa: F401
from tiny_base import sums, write_rows, write_tiny_base

from artifacts.base_model import inspect_base
from artifacts.content import file_sha256
from artifacts.errors import RankwiseError
from storage import claims, datasets, models
from storage.blobs import BlobStore
from workers.attempt import AttemptSpec
from workers.context import Interruption, JobContext, JobOutcome
from workers.kinds import KINDS
from workers.publishing import publish
from workers.remotes import Remotes
from workers.runtime import load_function


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def run_here(pool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a job in this process and publishes what it made; gives the job's result. What it raises is raised."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # its thread would stay

    def do(
        kind: str,
        *,
        remotes: Remotes | None = None,
        interruption: Interruption | None = None,
        model_roots: tuple[str, ...] = (),
        **params: Any,
    ) -> dict[str, Any]:
        job_id = pool.submit(kind, **params)
        with pool.database.write() as session:
            claim = claims.claim_next(session, server_id="srv", boot_id="run", slot="cpu:0", lease_seconds=60.0)
        assert claim is not None
        assert claim.job_id == job_id
        spec = AttemptSpec(
            job_id=job_id,
            attempt=claim.attempt,
            kind=kind,
            params=claim.params,
            slot="cpu:0",
            device="cpu",
            database_url="",
            blob_url=pool.settings().blob_url,
            scratch=str(pool.folder / job_id),
            cache=str(pool.folder / "cache"),
            model_roots=model_roots,
            function=KINDS[kind],
            remotes=remotes or Remotes(),
        )
        context = JobContext(spec, pool.database, BlobStore(spec.blob_url), interruption or Interruption())
        context.scratch.mkdir()
        try:
            outcome = load_function(spec.function)(context)
            assert isinstance(outcome, JobOutcome)
            return publish(context, outcome)
        except RankwiseError:
            with pool.database.write() as session:
                claims.finish_failed(session, job_id, claim.attempt, {"code": "x", "detail": "", "hint": None}, {})
            raise

    return do


@pytest.fixture
def train_pool(pool: Any, torch_provider: Any) -> Any:
    pool.provider = torch_provider
    return pool


@pytest.fixture
def base_id(train_pool: Any, tiny_base: Path) -> str:
    """The tiny model, registered."""
    with train_pool.database.write() as session:
        return models.add_model(session, inspect_base(tiny_base))[0].id


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_pipeline import write_tiny_pipeline

    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny-pipeline") / "pipeline")


@pytest.fixture
def pipeline_id(train_pool: Any, tiny_pipeline: Path) -> str:
    """The tiny pipeline, registered."""
    with train_pool.database.write() as session:
        return models.add_model(session, inspect_base(tiny_pipeline))[0].id


@pytest.fixture(scope="session")
def tiny_kmer_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transcript_rows import write_tiny_kmer_bert

    return write_tiny_kmer_bert(tmp_path_factory.mktemp("tiny-kmer-bert") / "base")


@pytest.fixture
def kmer_bert_id(train_pool: Any, tiny_kmer_bert: Path) -> str:
    """The tiny BERT of k-mers, registered."""
    with train_pool.database.write() as session:
        return models.add_model(session, inspect_base(tiny_kmer_bert))[0].id


@pytest.fixture
def add_fasta(train_pool: Any) -> Callable[[], str]:
    """Stores 60 transcripts; returns the dataset's id."""

    from transcript_rows import transcripts, write_fasta

    def add() -> str:
        return _store(train_pool, write_fasta(train_pool.folder / "transcripts.fa", transcripts()), "fasta", 60)

    return add


@pytest.fixture
def add_dataset(train_pool: Any) -> Callable[..., str]:
    """Stores rows as JSON Lines; returns the dataset's id."""

    def add(rows: list[dict[str, Any]] | None = None, name: str = "sums") -> str:
        found = sums() if rows is None else rows
        return _store(train_pool, write_rows(train_pool.folder / f"{name}.jsonl", found), "jsonl", len(found))

    return add


@pytest.fixture
def add_images(train_pool: Any) -> Callable[[int], str]:
    """Stores so many images with captions; returns the dataset's id."""

    from tiny_pipeline import write_images

    def add(count: int) -> str:
        return _store(train_pool, write_images(train_pool.folder / "images.zip", count), "images", count)

    return add


def _store(pool: Any, path: Path, format_: str, rows: int) -> str:
    digest = file_sha256(path)
    BlobStore(pool.settings().blob_url).put_file(path, digest)
    with pool.database.write() as session:
        row, added = datasets.add_dataset(
            session,
            name=path.stem,
            format=format_,
            sha256=digest,
            size=path.stat().st_size,
            rows=rows,
            columns=[],
        )
    assert added
    return row.id
