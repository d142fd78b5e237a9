"""What a job's function gets and gives: its parameters and inputs, a way to tell progress, and its results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog

from artifacts.base_model import BaseModelRef
from artifacts.content import file_sha256
from artifacts.errors import AttemptCancelled, BlobMissing, DatabaseUnavailable, NotFound
from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, claims, datasets, made_models, models, previews
from storage.adapters import Parent
from storage.blobs import BlobStore
from storage.database import Database
from storage.images import ImageFacts, ImageFile, Role
from storage.tables import ModelRow
from workers import base_models
from workers.attempt import AttemptSpec
from workers.base_models import ModelSource
from workers.cache import place
from workers.warm_models import WarmModels, model_bytes

if TYPE_CHECKING:
    from sqlalchemy.orm import Session
    from transformers import PreTrainedModel

    from compose.pipelines import LoadedPipeline
    from train.rows import Format

PROGRESS_SECONDS = 0.25
_FETCH_TRIES = 3

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Interruption:
    """Set by the signal handler of the worker process: `wanted` once the attempt shall stop.

    `forward` passes the wish on to the other ranks of an attempt on several devices.
    """

    attempt_runs: bool = False
    wanted: bool = False
    forward: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """What the database knows of an adapter that a job reads."""

    id: str
    name: str
    manifest: AdapterManifest
    base: BaseModelRef | None
    base_model: str | None
    model_id: str | None


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """What the database knows of a dataset."""

    id: str
    name: str
    format: Format
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What the database knows of a base model."""

    id: str
    name: str
    ref: BaseModelRef


@dataclass(frozen=True, slots=True)
class NewAdapter:
    """An adapter that a job made or fetched: a directory in the attempt's scratch, and what its row will say.

    `on_new_model`: its base is the first of the models that the job made, and part of what the adapter is.
    """

    directory: Path
    name: str
    description: str = ""
    tags: tuple[str, ...] = ()
    base_model: str | None = None
    model_id: str | None = None
    parents: tuple[Parent, ...] = ()
    source: Mapping[str, Any] | None = None
    on_new_model: bool = False


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model that a job made: a folder of plain files in the attempt's scratch, and what makes it again."""

    directory: Path
    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewFile:
    """A file of an image, in the attempt's scratch; its name there is the name that it is stored under."""

    path: Path
    role: Role
    media_type: str = "image/png"
    details: Mapping[str, Any] = field(default_factory=dict)

    def stored(self) -> ImageFile:
        """As the database takes it; reads the file."""
        entry = FileEntry(self.path.name, file_sha256(self.path), self.path.stat().st_size, self.media_type)
        return ImageFile(entry, self.role, self.details)


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image that a job made: what its row will say, and its files, the picture itself first."""

    facts: ImageFacts
    files: tuple[NewFile, ...]


@dataclass(frozen=True, slots=True)
class JobOutcome:
    """What a job's function returns.

    Attributes:
        report: JSON-able.
        files: blobs that `also` writes rows of, each with the file that has its bytes.
        also: what else becomes visible in the same transaction; it is given the ids of the adapters, and may raise. It
            may add to the report, and gives the digests of blobs that it left without a use.
    """

    adapters: tuple[NewAdapter, ...] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[NewImage, ...] = ()
    files: tuple[tuple[FileEntry, Path], ...] = ()
    also: Callable[[Session, Sequence[str]], Sequence[str]] | None = None
    models: tuple[NewModel, ...] = ()


class JobContext:
    """One attempt, as the job's function sees it."""

    def __init__(
        self,
        spec: AttemptSpec,
        database: Database,
        blobs: BlobStore,
        interruption: Interruption,
        warm: WarmModels | None = None,
        rank: int = 0,
    ) -> None:
        self.spec = spec
        self.database = database
        self.blobs = blobs
        self.rank = rank
        self._warm = warm if warm is not None else WarmModels()
        self.scratch = Path(spec.scratch)
        self._interruption = interruption
        self._last_progress = float("-inf")

    @property
    def params(self) -> Mapping[str, Any]:
        return self.spec.params

    @property
    def device(self) -> str:
        """Where the heavy arithmetic belongs: "cpu" or "cuda:0"."""
        return self.spec.device

    @property
    def world_size(self) -> int:
        """Number of ranks, one for each device; this process is number `rank` of them."""
        return self.spec.devices

    @property
    def reduce_memory(self) -> bool:
        """An earlier attempt ran out of the device's memory: use less of it this time."""
        return bool(self.spec.resources.get("reduce_memory"))

    @property
    def stop_wanted(self) -> bool:
        """This process was asked to stop: there is time for a checkpoint, then `check_cancelled` ends the attempt."""
        return self._interruption.wanted

    def check_cancelled(self) -> None:
        """Raises AttemptCancelled if this process was asked to stop. Costs nothing: call it in every loop."""
        if self._interruption.wanted:
            raise AttemptCancelled(f"attempt {self.spec.attempt} of {self.spec.job_id} was asked to stop")

    def progress(self, fraction: float, message: str, step: int | None = None, total: int | None = None) -> None:
        """Tell how far the job is (fraction from 0 to 1); written at most every `PROGRESS_SECONDS`, by rank 0 only.

        A database that does not answer for a while costs the progress, not the job: the lease decides over that.

        Raises:
            AttemptCancelled: the job is being cancelled.
            AttemptStale: a newer attempt owns the job.
        """
        self.check_cancelled()
        now = time.monotonic()
        if self.rank != 0 or now - self._last_progress < PROGRESS_SECONDS:
            return
        try:
            with self.database.write() as session:
                claims.record_progress(
                    session,
                    self.spec.job_id,
                    self.spec.attempt,
                    fraction=fraction,
                    message=message,
                    step=step,
                    total=total,
                )
        except DatabaseUnavailable as error:
            log.warning("progress_not_written", job_id=self.spec.job_id, error=error.detail)
        self._last_progress = time.monotonic()

    def adapter(self, adapter_id: str, *, deleted: bool = False) -> tuple[StoredAdapter, Path]:
        """What is known of an adapter, and a directory with its files, whose digests were verified.

        Args:
            deleted: take it also if it was deleted: the sweep leaves the files of what an unfinished job names.

        Raises:
            NotFound: there is no such adapter, or it was deleted since the job was submitted.
            BlobMissing, BlobCorrupt, BlobStoreUnavailable: its files can not be had.
        """
        with self.database.read() as session:
            row = adapters.get_adapter(session, adapter_id, deleted=deleted)
            stored = StoredAdapter(
                id=row.id,
                name=row.name,
                manifest=adapters.manifest_of(row),
                base=adapters.base_of(session, row),
                base_model=row.base_model,
                model_id=row.model_id,
            )
        directory = self.scratch / "inputs" / adapter_id
        for entry in stored.manifest.files:
            self.fetch(entry.sha256, directory / entry.path)
        return stored, directory

    def base_model(self, model_id: str, dtype: str = "auto") -> PreTrainedModel:
        """The registered base model in evaluation mode on the attempt's device, with no gradients.

        Other attempts of this process get the same object while it is kept: whoever changes it must put it back.

        Args:
            dtype: a torch dtype's name, or "auto": as stored.

        Raises:
            NotFound: there is no such model, or its files are gone.
            RequestInvalid: it lies outside of the folders that models may lie in, or can not be loaded.
        """
        with self.database.read() as session:
            row = models.get_model(session, model_id)
        source = self._locate(row)
        key = (row.id, dtype, self.device)
        model: PreTrainedModel = self._warm.get(
            key, self._warm_limit, source.size, lambda: base_models.load(source, dtype=dtype, device=self.device)
        )
        return model

    def pipeline(self, model_id: str, dtype: str) -> tuple[StoredModel, LoadedPipeline]:
        """What is known of a registered pipeline, and the pipeline on the attempt's device with its adapters at rest.

        Other attempts of this process get the same object while it is kept.

        Args:
            dtype: a torch dtype's name.

        Raises:
            NotFound: there is no such model, or its files are gone.
            RequestInvalid: it lies outside of the folders that models may lie in.
            ComposeRefused: it is no pipeline that images are composed with, or can not be loaded.
        """
        stored, source = self.model_source(model_id)
        found: LoadedPipeline = self._warm.get(
            (stored.id, dtype, self.device),
            self._warm_limit,
            source.size,
            lambda: base_models.load_pipeline(source, dtype=dtype, device=self.device),
            lambda loaded: sum(model_bytes(part) for part in loaded.parts),
        )
        return stored, found

    @property
    def _warm_limit(self) -> int:
        """Bytes that kept models may take."""
        return self.spec.warm_bytes if self.spec.warm_bytes is not None else base_models.default_limit(self.device)

    def preview(self, step: int, total: int, data: bytes, media_type: str) -> None:
        """Show what the job's image looks like by now; `data` has at most `storage.previews.MAX_BYTES`.

        Raises:
            AttemptCancelled: the job is being cancelled.
            AttemptStale: a newer attempt owns the job.
        """
        try:
            with self.database.write() as session:
                previews.record_preview(
                    session,
                    self.spec.job_id,
                    self.spec.attempt,
                    step=step,
                    total=total,
                    data=data,
                    media_type=media_type,
                )
        except DatabaseUnavailable as error:
            log.warning("preview_not_written", job_id=self.spec.job_id, error=error.detail)

    def dataset(self, dataset_id: str) -> tuple[StoredDataset, Path]:
        """What is known of a dataset, and its file, whose digest was verified.

        Raises:
            NotFound: there is no such dataset, or it was deleted since the job was submitted.
            BlobMissing, BlobCorrupt, BlobStoreUnavailable: its file can not be had.
        """
        with self.database.read() as session:
            row = datasets.get_dataset(session, dataset_id)
            # only `train.rows.FORMATS` are stored
            stored = StoredDataset(row.id, row.name, cast("Format", row.format), row.sha256, row.rows)
        path = self.scratch / "inputs" / dataset_id
        self.fetch(stored.sha256, path)
        return stored, path

    def stored_model(self, model_id: str) -> StoredModel:
        """What is known of a registered base model. Raises NotFound."""
        with self.database.read() as session:
            row = models.get_model(session, model_id)
            return StoredModel(row.id, row.name, models.ref_of(row))

    def model_source(self, model_id: str, only: str = "") -> tuple[StoredModel, ModelSource]:
        """What is known of a registered base model, and where its files are: for a job that changes its own copy; of a
        model that a job made, those files whose names end with `only`.

        Raises:
            NotFound: there is no such model, or its files are gone.
            RequestInvalid: it lies outside of the folders that models may lie in.
        """
        with self.database.read() as session:
            row = models.get_model(session, model_id)
            stored = StoredModel(row.id, row.name, models.ref_of(row))
        return stored, self._locate(row, only)

    def _locate(self, row: ModelRow, only: str = "") -> ModelSource:
        """Where a base model's files are; those of one that a job made are fetched, if their names end with `only`.

        Raises:
            NotFound: its files are not there (any more).
            RequestInvalid: it lies outside of the folders that models may lie in.
            BlobMissing, BlobCorrupt, BlobStoreUnavailable, DiskFull
        """
        if row.source != "files":
            return base_models.locate(row, self.spec.model_roots)
        with self.database.read() as session:
            made = made_models.made_model(session, row.id)
        if made is None:
            raise NotFound(f"The files of the base model {row.name!r} went with it when it was removed.")
        folder = self.scratch / "inputs" / row.id
        for file in made.files:
            if file.path.endswith(only) and not (folder / file.path).exists():
                self.fetch(file.sha256, folder / file.path)
        return ModelSource(row.name, str(folder), None, made.size)

    def fetch(self, sha256: str, destination: Path) -> None:
        """Have the blob's bytes, verified, at `destination`, which must not be changed.

        Raises:
            BlobMissing, BlobCorrupt, BlobStoreUnavailable, DiskFull
        """
        destination.parent.mkdir(parents=True, exist_ok=True)
        cache = Path(self.spec.cache)
        for _ in range(_FETCH_TRIES):
            path = self.blobs.materialize(sha256, cache)
            if not path.is_relative_to(cache):  # a local store's own file: never dropped while a row names it
                destination.symlink_to(path)
                return
            try:
                place(path, destination)
            except FileNotFoundError:
                continue  # another worker made room in the cache in this very moment
            return
        raise BlobMissing(f"blob {sha256} vanished from the cache {_FETCH_TRIES} times", hint="Is its disk too small?")
