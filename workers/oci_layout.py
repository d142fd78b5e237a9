"""An adapter as an OCI image layout: a manifest, its blobs by digest, and an index that names it.

Sources: OCI image specification 1.1 (image-layout.md, manifest.md, image-index.md); media types, configuration and
annotations of the CNCF's model specification (github.com/modelpack/model-spec). Files are raw layers with their names
as titles, so that general tools (ORAS) put them back as files too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.errors import FileBroken
from storage.tables import AdapterRow
from workers.pushed_files import PushedFile

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
DOC = "application/vnd.cncf.model.doc.v1.raw"
LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
REF_NAME = "org.opencontainers.image.ref.name"
_SCALES = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


@dataclass(frozen=True, slots=True)
class ModelManifest:
    """The two small documents of an artifact. Their digests do not depend on when they are made."""

    config: bytes
    manifest: bytes

    @property
    def digest(self) -> str:
        """That the artifact is pulled by: "sha256:…"."""
        return _digest(self.manifest)

    def descriptor(self, tag: str) -> dict[str, Any]:
        """The entry of an index."""
        return {
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "digest": self.digest,
            "size": len(self.manifest),
            "annotations": {REF_NAME: tag},
        }


def manifest_of(row: AdapterRow, layout: str, precision: str, files: Sequence[PushedFile]) -> ModelManifest:
    """The manifest of an adapter's files, one layer for each."""
    described: dict[str, Any] = {"name": row.name}
    if row.description:
        described["description"] = row.description
    if row.base_model is not None:
        described["family"] = row.base_model
    config = _json(
        {
            "descriptor": described,
            "config": {"format": layout, "paramSize": _scaled(row.parameter_count), "precision": precision},
            "modelfs": {"type": "layers", "diffIds": [f"sha256:{file.sha256}" for file in files]},
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": {"mediaType": CONFIG, "digest": _digest(config), "size": len(config)},
            "layers": [_layer(file) for file in files],
            "annotations": {
                "org.opencontainers.image.title": row.name,
                "rankwise.adapter": row.id,
                "rankwise.weights-digest": row.weights_digest,
            },
        }
    )
    return ModelManifest(config, manifest)


def index_with(old: bytes | None, descriptor: Mapping[str, Any]) -> bytes:
    """An index that holds the artifact under its tag, beside whatever else it held.

    Raises:
        FileBroken: the old one is no index.
    """
    kept: list[Any] = []
    document: dict[str, Any] = {"schemaVersion": 2, "mediaType": INDEX}
    if old is not None:
        try:
            document = json.loads(old)
            tag = descriptor["annotations"][REF_NAME]
            kept = [item for item in document["manifests"] if (item.get("annotations") or {}).get(REF_NAME) != tag]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FileBroken("The index.json that is there is not that of an OCI image layout.") from error
    return _json({**document, "manifests": [*kept, dict(descriptor)]})


def _layer(file: PushedFile) -> dict[str, Any]:
    return {
        "mediaType": _media_type(file.name),
        "digest": f"sha256:{file.sha256}",
        "size": file.size,
        "annotations": {"org.cncf.model.filepath": file.name, "org.opencontainers.image.title": file.name},
    }


def _media_type(name: str) -> str:
    if name.endswith((".safetensors", ".gguf")):
        return WEIGHT
    return DOC if name.endswith((".md", ".txt")) or name in ("LICENSE", "NOTICE") else WEIGHT_CONFIG


def _scaled(count: int) -> str:
    for scale, letter in _SCALES:
        if count >= scale:
            return f"{count / scale:.1f}".removesuffix(".0") + letter
    return f"{count / 1000:.1f}K"


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
