"""The job kind "transfer": fetch what the transfer is given and its stage outputs, move the adapter, have it judged.

Published is what the gate lets pass; what it holds waits, with its files, for a decision; of what it refuses the report
tells. Seeds and answers stay in this process and in the stage outputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from artifacts import intake
from artifacts.errors import RankwiseError
from storage import aliases, sealed_inputs, transfers
from storage.adapters import Parent
from storage.transfers import HeldAdapter, Verdict
from train.base_files import BaseFiles
from transfer.bench import STAGE_SHARES, StoredDiscriminator, TransferInputs
from transfer.catalog import find_method, parse_parameters
from transfer.evaluation import Item
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.gate import GateSettings
from transfer.identity import base_identity
from transfer.options import TransferOptions
from transfer.owner_rows import INPUT_COLUMNS, ITEM_COLUMNS, read_texts
from transfer.pipeline import TransferResult, transfer
from transfer.prompts import PromptFormat
from transfer.weight_transfer import BaseWeights
from workers.adapter_names import default_name
from workers.checkpointing import Checkpoints
from workers.context import JobContext, JobOutcome, NewAdapter, StoredModel
from workers.jobs.target_engine import for_engine
from workers.jobs.train import JobObserver

LIBRARIES = ("rankwise", "torch", "transformers", "peft")
DEGRADED = "degraded"
"""The tag of an adapter that learnt from inputs of which too few were accepted."""
SCRATCH = frozenset({"work"})
"""Folders that a training makes anew."""
COST_SHARE = 10
"""Stage outputs are kept whenever what was done since the last time took so many times as long as keeping them."""


def run(context: JobContext) -> JobOutcome:
    """Move the adapter that the job's parameters name to another base model.

    `params`: {adapter, target_model, method, parameters, seeds: {count, digest}, task, format, inputs, holdout, gate,
    controls, seed, name, target_engine}. The texts of the seeds lie sealed beside the job.

    Raises:
        NotFound: the adapter, a base model or a dataset is not there any more.
        TransferRefused, TransferStarved, NotMergeable and their kin: see `transfer.pipeline.transfer`.
        AttemptCancelled, AttemptStale
    """
    params = context.params
    method = find_method(params["method"])
    options = parse_parameters(method.name, params.get("parameters") or {})
    given = Given.of(context)
    checkpoints = Checkpoints(context)
    folder = context.scratch / "transfer"
    folder.mkdir()
    resumed = checkpoints.fetch()
    if resumed is not None:
        folder.rmdir()
        resumed[0].rename(folder)
    observer = TransferFollower(context, checkpoints, folder, 0 if resumed is None else resumed[1])
    result = transfer(
        method,
        options,
        given.inputs(context, folder),
        GateSettings.model_validate(params.get("gate") or {}),
        observer,
        tuple(params.get("controls") or ()),
    )
    observer.flush()
    return given.outcome(context, options, result)


class Given:
    """What the job names, fetched."""

    def __init__(self, context: JobContext) -> None:
        params = context.params
        with context.database.read() as session:
            row = transfers.get_transfer(session, context.spec.job_id)
            self.key, source_id, target_id = row.key, row.source_model, row.target_model
            self.sealed = sealed_inputs.unseal(session, context.spec.job_id)
        self.adapter, self.folder = context.adapter(params["adapter"], deleted=True)
        self.source, self.source_weights = _base(context, source_id)
        self.target, self.target_weights = _base(context, target_id)

    @classmethod
    def of(cls, context: JobContext) -> Given:
        """Raises NotFound and what fetching raises."""
        return cls(context)

    def inputs(self, context: JobContext, folder: Path) -> TransferInputs:
        """As the pipeline takes it."""
        params, sealed = context.params, self.sealed
        kept = _rows(context, params.get("inputs"), INPUT_COLUMNS, "/inputs")
        items = _rows(context, params.get("holdout"), ITEM_COLUMNS, "/holdout")
        return TransferInputs(
            adapter=self.folder,
            source=self.source_weights,
            target=self.target_weights,
            prompt_format=PromptFormat.model_validate(sealed.get("format") or {}),
            key=self.key,
            seed=params.get("seed") or 0,
            folder=folder,
            cache=Path(context.spec.cache) / "subspaces",
            seeds=tuple(sealed.get("seeds") or ()),
            inputs=tuple(row[0] for row in kept),
            discriminator=self._discriminator(context),
            holdout=tuple(Item(x, answer) for x, answer in items),
            device=context.device,
            # After the device's memory ran out once, half of a batch at a time: the same sums, in another order.
            micro_batches=2 if context.reduce_memory else 1,
        )

    def _discriminator(self, context: JobContext) -> StoredDiscriminator | None:
        known = self.sealed.get("discriminator")
        if known is None:
            return None
        folder = context.scratch / "inputs" / "discriminator"
        for file in known["files"]:
            context.fetch(file["sha256"], folder / file["path"])
        return StoredDiscriminator(
            folder, known["digest"], DiscriminatorRecipe.model_validate(known["recipe"]), known.get("auc")
        )

    def outcome(self, context: JobContext, options: TransferOptions, result: TransferResult) -> JobOutcome:
        """What the verdict makes of the result."""
        judged: Verdict = "hold" if result.gate is None else result.gate.verdict
        degraded = bool(result.report.get("degraded"))
        report = dict(result.report) | {
            "verdict": judged,
            "seed": context.params.get("seed") or 0,
            "parameters": options.model_dump(mode="json"),
            "bases": {"source": self._told(self.source), "target": self._told(self.target)},
            "discriminator_digest": (self.sealed.get("discriminator") or {}).get("digest"),
            "versions": {library: version(library) for library in LIBRARIES},
        }
        job_id = context.spec.job_id
        fitted, told = for_engine(context, result.adapter)
        report |= told
        made = self._adapter(context, replace(result, adapter=fitted), report, degraded)
        held = _held(made) if judged == "hold" else None

        def judge(session: Session, ids: Sequence[str]) -> Sequence[str]:
            transfers.record_end(
                session, job_id, judged, degraded=degraded, new_adapter=ids[0] if ids else None, held=held
            )
            alias = context.params.get("alias")
            if alias is not None:
                passed = judged == "pass" and bool(ids)
                report["alias_switched"] = passed and aliases.move_with(session, alias, self.adapter.id, ids[0], job_id)
            return ()

        files = () if held is None else tuple((entry, made.directory / entry.path) for entry in held.manifest.files)
        return JobOutcome((made,) if judged == "pass" else (), report, files=files, also=judge)

    def _adapter(
        self, context: JobContext, result: TransferResult, report: Mapping[str, Any], degraded: bool
    ) -> NewAdapter:
        params = context.params
        told = ("method", "parameters", "seed", "bases", "discriminator_digest", "data", "gate", "verdict", "versions")
        recipe = {name: report.get(name) for name in told} | {"key": self.key, "degraded": degraded}
        described = f"Transferred from {self.source.name} to {self.target.name} with {report['method']}."
        if degraded:
            described += " Degraded: too few generated inputs were accepted, so that the best of the others were taken."
        return NewAdapter(
            directory=result.adapter,
            name=params.get("name") or default_name([self.adapter.name], report["method"], "transfer"),
            description=described,
            tags=(DEGRADED,) if degraded else (),
            base_model=self.target.name,
            model_id=self.target.id,
            parents=(Parent(self.adapter.id, recipe),),
        )

    @staticmethod
    def _told(model: StoredModel) -> dict[str, Any]:
        ref = model.ref
        return {
            "id": model.id,
            "name": model.name,
            "weights_digest": ref.weights_digest,
            "tokenizer_digest": ref.tokenizer_digest,
        }


def _held(made: NewAdapter) -> HeldAdapter:
    return HeldAdapter(
        manifest=intake.inspect(made.directory, base_model=made.base_model),
        name=made.name,
        description=made.description,
        tags=made.tags,
        base_model=made.base_model,
        model_id=made.model_id,
        parents=made.parents,
    )


def _base(context: JobContext, model_id: str) -> tuple[StoredModel, BaseWeights]:
    model, source = context.model_source(model_id)
    ref = model.ref
    if ref.weights_digest is None or ref.tokenizer_digest is None:  # submissions without them are refused
        raise RankwiseError(f"nothing is known of the weights or the tokenizer of {model.name!r}")
    digest = base_identity(ref.weights_digest, ref.tokenizer_digest)
    return model, BaseWeights(BaseFiles(model.name, source.location, source.revision), digest)


def _rows(context: JobContext, dataset_id: str | None, columns: Sequence[str], pointer: str) -> list[tuple[str, ...]]:
    if dataset_id is None:
        return []
    dataset, path = context.dataset(dataset_id)
    return read_texts(path, dataset.format, columns, pointer)


class TransferFollower:
    """Keeps the stage outputs of a transfer as its job's checkpoint, and tells how far it is.

    What is kept is whole at every unit; keeping it takes at most a tenth of the time.
    """

    def __init__(self, context: JobContext, checkpoints: Checkpoints, folder: Path, number: int) -> None:
        self._context, self._checkpoints, self._folder = context, checkpoints, folder
        self._number, self._units = number, 0
        self._fraction = 0.0
        self._stage = ""
        self._training = JobObserver(context, checkpoints, (STAGE_SHARES["train"], STAGE_SHARES["evaluate"]))
        self._kept, self._cost = time.monotonic(), 0.0

    def unit(self, stage: str, message: str) -> None:
        self._context.check_cancelled()
        if stage != self._stage or time.monotonic() - self._kept > COST_SHARE * self._cost:
            self._keep()
        self._stage = stage
        self._units += 1
        self._fraction = max(self._fraction, STAGE_SHARES[stage])
        self._context.progress(self._fraction, f"{stage}: {message}", self._units)

    def stop_wanted(self) -> bool:
        return self._context.stop_wanted

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self._training.step(step, total, values)

    def kept(self) -> None:
        self._training.flush()
        self._keep()

    def flush(self) -> None:
        self._training.flush()

    def _keep(self) -> None:
        if not any(self._folder.iterdir()):
            return
        began = time.monotonic()
        if self._checkpoints.publish(self._folder, self._number + 1, without=SCRATCH):
            self._number += 1
        self._kept = time.monotonic()
        self._cost = self._kept - began
