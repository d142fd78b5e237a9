"""Adapters as the interface shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, StringConstraints

from app.dependencies import PLAIN, FilterText, PageQuery
from app.schemas.common import BaseModelName, Name, RequestModel, Timestamp
from app.schemas.models import Reason
from app.uploads import MAX_FILES
from artifacts.compatibility import Engine
from artifacts.manifest import KeyUse
from artifacts.menu import NO_NUL
from storage.adapters import Lineage
from storage.tables import AdapterRow, AdapterWaiverRow, TransferableRow

MAX_TAGS = 64
MAX_DESCRIPTION = 20_000

Tag = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f,]+$")]
Description = Annotated[str, StringConstraints(max_length=MAX_DESCRIPTION, pattern=NO_NUL)]


class AdapterForm(RequestModel):
    """The text fields of an upload."""

    name: Name | None = None
    base_model: BaseModelName | None = None
    description: Description = ""
    tags: list[Tag] = Field(default_factory=list, max_length=MAX_TAGS)


class AdapterQuery(PageQuery):
    """Filters of the list; all of them must hold."""

    base_model: FilterText | None = Field(None, description="Name or id of the base model.")
    method: FilterText | None = Field(None, description="lora, rslora, dora, dylora …")
    tag: FilterText | None = None
    name: FilterText | None = Field(None, description="Part of the name, in any case.")
    sha256: Annotated[str, StringConstraints(pattern="^([0-9a-f]{10}|[0-9a-f]{64})$")] | None = Field(
        None, description="Digest of the weights or of one file; or the first 10 digits of a file's (AutoV2)."
    )


class AdapterSummary(BaseModel):
    """An adapter, without its configuration and its list of modules."""

    id: str
    name: str
    description: str
    tags: list[str]
    format: str = Field(description="Layout of the stored files.")
    method: str
    base_model: str | None
    base_model_revision: str | None
    model_id: str | None = Field(description="The registered base model, when it is known.")
    rank: int
    alpha: float
    target_modules: list[str]
    module_count: int
    parameter_count: int
    dtype: str
    size: int = Field(description="Bytes of all files together.")
    mergeable: bool
    refusal: str | None = Field(description="Why it can not be merged.")
    weights_digest: str = Field(description="SHA-256 over the tensors without metadata.")
    identity_digest: str
    origin: str = Field(description="upload, or the kind of the job that made it.")
    job_id: str | None
    created_at: Timestamp

    @classmethod
    def of(cls, row: AdapterRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class AdapterFile(BaseModel):
    path: str
    sha256: str
    size: int
    media_type: str


class AdapterModule(BaseModel):
    """One adapted module: ΔW = scaling·B·A has d_out×d_in elements; 0 where the files of a MiSS adapter do not tell."""

    path: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    d_in: int
    d_out: int
    dtype: str


class TypedModule(BaseModel):
    """One module whose ΔW is no product of stored factors; dimensions are 0 where the file does not tell them."""

    path: str
    type: str = Field(description="loha, lokr, oft, boft, ia3, glora, full, norm, bias …")
    rank: int
    alpha: float
    scaling: float
    d_out: int
    d_in: int
    targets: list[str] = Field(description="The modules, when a fused projection has several.")


class Ability(BaseModel):
    """Whether something can be done with an adapter, and why not."""

    able: bool
    reason: str | None


class Facts(BaseModel):
    """What was understood of the file."""

    architecture: str | None = Field(None, description="Known base model whose modules the file names: sdxl, flux …")
    modules_in_file: int = Field(0, description="Distinct names of modules in the file; fused ones count once.")
    partial: bool = Field(False, description="Whether tensors of an adapter were left out; `GET …/keys` says which.")
    composable: Ability | None = Field(None, description="Whether images can be composed with it.")
    exact_as_lora: Ability | None = Field(None, description="Whether every ΔW is exactly a low-rank product.")
    typed: list[TypedModule] = []


class KeyVerdict(BaseModel):
    """What became of one tensor."""

    key: str
    use: KeyUse = Field(description="used: part of a low-rank ΔW; kept: stored, part of something else; ignored.")
    role: str = Field(description="lora_A, lora_B, alpha, hada_w1_a …; empty when it has none.")
    modules: list[str] = Field(description="Modules that it is part of.")
    note: str = Field(description="How it was converted, or why it is ignored.")


class KeyQuery(PageQuery):
    """Paging and filter of a file's keys."""

    use: KeyUse | None = None


class KeyPage(BaseModel):
    """Some keys, in the order of the file."""

    items: list[KeyVerdict]
    next: str | None = Field(description="Cursor of the next page; null on the last.")


class IgnoredItem(BaseModel):
    key: str
    reason: str


class Report(BaseModel):
    """What became of every key and file of the upload."""

    used_keys: int
    ignored: list[IgnoredItem]
    nonfinite: dict[str, int] = Field(description="Tensor key → number of NaN and infinite elements.")
    dropped_files: list[IgnoredItem]
    warnings: list[str]


class WaiverRequest(RequestModel):
    reason: Reason = Field(description="Why the adapter need not outlive its base model.")


class Waiver(BaseModel):
    """Somebody has accepted that the adapter goes out of use with its base model."""

    reason: str
    created_by: str | None = Field(description="The API key of whoever did.")
    created_at: Timestamp

    @classmethod
    def of(cls, row: AdapterWaiverRow) -> Self:
        return cls.model_validate(row, from_attributes=True)


class TransferableSummary(BaseModel):
    """What an adapter keeps for transfers to other base models; the seeds and the discriminator are shown to nobody."""

    task: str = Field(description="Short name of the task, as the training gave it.")
    seeds: int = Field(description="How many.")
    size: int = Field(description="Inputs of the training data.")
    auc: float = Field(description="The chance that the discriminator ranks a held-out input above an invented one.")

    @classmethod
    def of(cls, row: TransferableRow) -> Self:
        return cls(task=row.task, seeds=len(row.seeds), size=row.size, auc=row.auc)


class Adapter(AdapterSummary):
    """Everything that is known of an adapter."""

    ranks: list[int] = Field(
        description="Ranks that ?rank of a download can have; empty unless it was trained for that (method dylora)."
    )
    config: dict[str, Any]
    files: list[AdapterFile]
    modules: list[AdapterModule]
    facts: Facts = Facts()
    report: Report
    source: dict[str, Any] | None = Field(
        None, description="Where an imported adapter was fetched from: the commit, or the ETag, and its files' digests."
    )
    waiver: Waiver | None = Field(None, description="Whether it may go with its base model.")
    transferable: TransferableSummary | None = Field(
        None, description="Set if the adapter was trained with `transferable`; null otherwise."
    )

    @classmethod
    def of(cls, row: AdapterRow, waiver: AdapterWaiverRow | None = None, kept: TransferableRow | None = None) -> Self:
        found = cls.model_validate(row, from_attributes=True)
        # nothing for adapters that were stored before this was kept
        found.facts = Facts.model_validate(row.report.get("facts") or {})
        found.waiver = None if waiver is None else Waiver.of(waiver)
        found.transferable = None if kept is None else TransferableSummary.of(kept)
        return found


class LineageNode(BaseModel):
    id: str
    name: str
    method: str
    origin: str
    source: dict[str, Any] | None = Field(None, description="Where an imported adapter was fetched from.")
    deleted: bool
    created_at: Timestamp


class LineageEdge(BaseModel):
    """`child` was made from `parent`."""

    child: str
    parent: str
    position: int
    job_id: str | None
    recipe: dict[str, Any]


class AdapterLineage(BaseModel):
    """Ancestors and descendants with the recipe of each step."""

    id: str
    nodes: list[LineageNode]
    edges: list[LineageEdge]
    truncated: bool = Field(description="Whether the graph is larger; the nearest adapters are here.")

    @classmethod
    def of(cls, adapter_id: str, lineage: Lineage) -> Self:
        return cls(
            id=adapter_id,
            nodes=[
                LineageNode(
                    id=row.id,
                    name=row.name,
                    method=row.method,
                    origin=row.origin,
                    source=row.source,
                    deleted=row.deleted_at is not None,
                    created_at=row.created_at,
                )
                for row in lineage.nodes
            ],
            edges=[
                LineageEdge(
                    child=row.child_id,
                    parent=row.parent_id,
                    position=row.position,
                    job_id=row.job_id,
                    recipe=row.recipe,
                )
                for row in lineage.edges
            ],
            truncated=lineage.truncated,
        )


class CompatibilityFinding(BaseModel):
    """What one rule of an engine says of an adapter."""

    rule: str
    level: Literal["refuses", "changes", "needs"] = Field(
        description="refuses: it is not loaded. changes: it is, as another ΔW. needs: it is, if that is seen to."
    )
    pointer: str = Field(description="Where in the adapter the cause stands.")
    message: str
    remedy: str
    source: str = Field(description="Where the rule is from.")


class Compatibility(BaseModel):
    """Whether an engine loads an adapter."""

    engine: Engine
    loads: bool = Field(description="Whether nothing is refused and nothing applied otherwise.")
    findings: list[CompatibilityFinding]


UPLOAD_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["file"],
    "properties": {
        "file": {
            "description": "A .safetensors, .gguf, .zip, .tar or .tar.gz, or files of a PEFT directory, one part each.",
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_FILES,
            "items": {"type": "string", "format": "binary"},
        },
        "name": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": PLAIN},
        "base_model": {
            "type": "string",
            "minLength": 1,
            "maxLength": 300,
            "pattern": PLAIN,
            "description": "Id or name of the base model; unset: what adapter_config.json names.",
        },
        "description": {"type": "string", "maxLength": MAX_DESCRIPTION},
        "tags": {
            "description": "Comma-separated, or the field repeated.",
            "type": "array",
            "maxItems": MAX_TAGS,
            "items": {"type": "string", "minLength": 1, "maxLength": 100, "pattern": PLAIN},
        },
    },
}
