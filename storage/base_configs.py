"""config.json of the base model of an adapter, from wherever it can be read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import BlobMissing, ConfigRefused
from artifacts.formats.gguf import BASE_CONFIG
from artifacts.layout import MAX_CONFIG_BYTES, parse_json, read_json
from storage import made_models, models
from storage.blobs import BlobStore
from storage.database import Database
from storage.tables import AdapterFileRow, AdapterRow, ModelFileRow, ModelRow


@dataclass(frozen=True, slots=True)
class BaseConfigs:
    """Reads them from where files of base models are: blobs, and folders under the roots."""

    database: Database
    blobs: BlobStore
    roots: Sequence[str | Path] = ()

    def of_adapter(self, row: AdapterRow) -> Mapping[str, Any] | None:
        """The file that was sent along with the adapter, else that of its registered base model; None if there is
        none."""
        sent = self._stored(row.files)
        if sent is not None or row.base_model is None:
            return sent
        with self.database.read() as session:
            model = models.find_model(session, row.model_id or row.base_model, row.base_model_revision)
        return None if model is None else self.of_model(model)

    def of_model(self, model: ModelRow) -> Mapping[str, Any] | None:
        """That of a registered base model; None if its files are not within reach, or it has none that can be read."""
        if model.source == "files":
            with self.database.read() as session:
                made = made_models.made_model(session, model.id)
                files = [] if made is None else list(made.files)
            return self._stored(files)
        if model.source != "path":
            return None
        folder = Path(model.location).resolve()
        within = any(folder.is_relative_to(Path(root).resolve()) for root in self.roots)
        path = folder / BASE_CONFIG
        try:
            return read_json(path) if within and path.is_file() else None
        except (ConfigRefused, OSError):
            return None

    def _stored(self, files: Sequence[AdapterFileRow | ModelFileRow]) -> Mapping[str, Any] | None:
        file = next((item for item in files if item.path == BASE_CONFIG and item.size <= MAX_CONFIG_BYTES), None)
        if file is None:
            return None
        try:
            return parse_json(b"".join(self.blobs.stream(file.sha256)).decode("utf-8"), BASE_CONFIG)
        except (ConfigRefused, BlobMissing, UnicodeDecodeError):
            return None
