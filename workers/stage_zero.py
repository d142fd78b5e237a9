"""The part of a training job that makes its adapter transferable: after the adapter, before anything is published.

The adapter that is done, what was invented so far and the discriminator's training lie in one folder, which is what the
job's checkpoints hold from then on. Nothing of the training data is in it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from artifacts import intake
from artifacts.base_model import BaseModelRef
from artifacts.manifest import FileEntry
from storage import datasets, sealed_inputs, transferables
from storage.transferables import Transferable
from train.base_files import BaseFiles
from train.data import DataFile
from train.engine import Plan
from train.settings import CausalLmTask, TrainingSettings
from transfer.distillation import Distillation
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.seeds import parse_seeds
from transfer.stage_files import StageFiles
from transfer.stage_zero import StageZero
from transfer.task_inputs import read_inputs
from transfer.transferable import TransferableSettings
from workers.checkpointing import Checkpoints
from workers.context import JobContext

ADAPTER_SHARE, INVENTED_SHARE = 0.6, 0.75
"""Where the adapter's training and the inventing of inputs end on the job's progress bar."""
ROOM = 256
"""Tokens that the question about an input may have besides it."""
KEPT_BEFORE = (
    "The same adapter was transferable before: what was kept with it then stays, and the new seeds and discriminator "
    "are forgotten. Delete the adapter and train again to replace them."
)
_ADAPTER, _REPORT, _UNITS, _TRAINING = "adapter", "report.json", "units", "discriminator"


class TransferableTraining:
    """Stage 0 of one training job."""

    def __init__(
        self,
        context: JobContext,
        checkpoints: Checkpoints,
        plan: Plan,
        base: BaseFiles,
        ref: BaseModelRef,
        data: DataFile,
    ) -> None:
        """Reads the data's inputs, and refuses what would only fail after the adapter's training.

        Raises:
            NotFound: the job's seeds are not there any more.
            RequestInvalid, TransferRefused: as `transfer.task_inputs.read_inputs` and `StageZero.check`.
        """
        asked = dict(context.params["transferable"])
        asked.pop("seeds")  # how many; they themselves are sealed
        self._settings = TransferableSettings.model_validate(asked)
        with context.database.read() as session:
            seeds = parse_seeds(sealed_inputs.unseal(session, context.spec.job_id)["seeds"])
        assert isinstance(plan.task, CausalLmTask)
        self._format, inputs = read_inputs(data, plan.task, self._settings.format)
        asked_chat = self._settings.discriminator.chat
        recipe = DiscriminatorRecipe(
            task=self._settings.task, chat=self._format.chat if asked_chat is None else asked_chat
        )
        how = Distillation(
            method="lora",
            options=self._settings.discriminator.options(plan.options),
            training=self._settings.discriminator.loop(plan.training),
            max_length=plan.task.max_length + ROOM,
            seed=plan.seed,
            device=plan.device,
            micro_batches=plan.micro_batches,
        )
        self._stage = StageZero(base, seeds, inputs, recipe, self._settings.discriminator, how)
        self._stage.check(self._format)
        self._context, self._checkpoints, self._ref, self._plan = context, checkpoints, ref, plan
        self._folder = context.scratch / "stage-0"
        self._number = 0
        self._saved_at = time.monotonic()

    def trained(self, checkpoint: tuple[Path, int] | None) -> tuple[Path, dict[str, Any]] | None:
        """The adapter and its report, if the checkpoint is from after its training."""
        if checkpoint is None or not (checkpoint[0] / _REPORT).exists():
            return None
        folder, self._number = checkpoint
        folder.rename(self._folder)
        return self._folder / _ADAPTER, json.loads((self._folder / _REPORT).read_text(encoding="utf-8"))

    def keep(self, adapter: Path, report: Mapping[str, Any]) -> Path:
        """The adapter is trained: from here on an interruption does not train it again. Returns where it is now."""
        self._folder.mkdir()
        adapter.rename(self._folder / _ADAPTER)
        (self._folder / _REPORT).write_text(json.dumps(report), encoding="utf-8")
        self._number = int(report["steps"])
        self.save()
        return self._folder / _ADAPTER

    def save(self) -> bool:
        """Publish a checkpoint."""
        self._number += 1
        self._saved_at = time.monotonic()
        return self._checkpoints.publish(self._folder, self._number)

    def run(self, report: dict[str, Any]) -> KeptForTransfers:
        """Invent inputs and train the discriminator; adds to the report what may be told of it.

        Raises:
            AttemptCancelled, AttemptStale: what was done is in a checkpoint.
            As `StageZero.invent` and `StageZero.train`.
        """
        context = self._context
        invented = self._stage.invent(StageFiles(self._folder / _UNITS), _Inventing(self, context, self._plan.training))
        begun = self._folder / _TRAINING
        resume = context.scratch / "discriminator-resume"
        if begun.exists():
            shutil.copytree(begun, resume)
        work, output = context.scratch / "discriminator-work", context.scratch / "discriminator"
        work.mkdir()
        observer = _Training(self, context, begun)
        found = self._stage.train(invented, work, output, observer, resume if resume.exists() else None)
        report["transferable"] = {
            "task": self._settings.task,
            "seeds": len(self._stage.seeds),
            "inputs": len(self._stage.inputs),
            "invented": len(invented),
            "trained": found.trained,
            "held_out": found.held_out,
            "auc": found.auc,
        }
        manifest = intake.inspect(output)
        kept = Transferable(
            seeds=self._stage.seeds,
            task=self._settings.task,
            prompt_format=self._format.model_dump(mode="json"),
            size=len(self._stage.inputs),
            recipe=self._stage.recipe.model_dump(mode="json"),
            files=manifest.files,
            discriminator_digest=manifest.identity_digest,
            discriminator_base={
                "model_id": context.params["base_model"],
                "weights_digest": self._ref.weights_digest,
                "tokenizer_digest": self._ref.tokenizer_digest,
            },
            auc=found.auc,
            settings={
                "discriminator": self._settings.discriminator.model_dump(mode="json"),
                "options": self._stage.how.options.model_dump(mode="json"),
                "training": self._stage.how.training.model_dump(mode="json"),
                "seed": self._plan.seed,
                "measured": found.to_dict(),
            },
        )
        dropped = context.params["dataset"] if self._settings.drop_dataset else None
        return KeptForTransfers(context.spec.job_id, output, kept, report, dropped)

    def due(self, training: TrainingSettings) -> bool:
        """Whether it is time for a checkpoint between two units."""
        return training.checkpoint_steps is not None or time.monotonic() - self._saved_at >= training.checkpoint_seconds


@dataclass(frozen=True, slots=True)
class KeptForTransfers:
    """What becomes visible, to workers alone, with the adapter.

    Attributes:
        folder: of the discriminator.
        report: of the job: is told what became of it.
        dropped: id of a dataset that nobody needs any more.
    """

    job_id: str
    folder: Path
    kept: Transferable
    report: dict[str, Any]
    dropped: str | None

    @property
    def files(self) -> tuple[tuple[FileEntry, Path], ...]:
        """The discriminator's, each with the file that has its bytes."""
        return tuple((entry, self.folder / entry.path) for entry in self.kept.files)

    def publish(self, session: Session, adapter_ids: Sequence[str]) -> Sequence[str]:
        """Write the rows, in the transaction that publishes the adapter; the digests of blobs left without a use."""
        if not transferables.add(session, adapter_ids[0], self.kept):
            self._warn(KEPT_BEFORE)
        if self.dropped is None:
            return ()
        needed = datasets.users_of(session, self.dropped, without=self.job_id)
        self.report["dataset_dropped"] = not needed
        if needed:
            self._warn(f"The dataset was kept, for it is needed by {', '.join(needed[: datasets.LISTED])}.")
            return ()
        return datasets.remove_dataset(session, self.dropped)

    def _warn(self, warning: str) -> None:
        self.report["warnings"] = [*self.report.get("warnings", ()), warning]


class _Inventing:
    """Follows the inventing of inputs."""

    def __init__(self, job: TransferableTraining, context: JobContext, training: TrainingSettings) -> None:
        self._job, self._context, self._training = job, context, training

    def unit(self, done: int, most: int) -> None:
        if self._context.stop_wanted or (done and self._job.due(self._training)):
            self._job.save()
        share = ADAPTER_SHARE + (INVENTED_SHARE - ADAPTER_SHARE) * done / most
        self._context.progress(share, f"inventing inputs: {done} of at most {most}")


class _Training:
    """Follows the discriminator's training: its losses and scores are told to nobody."""

    def __init__(self, job: TransferableTraining, context: JobContext, folder: Path) -> None:
        self._job, self._context, self._folder = job, context, folder
        self._told = time.monotonic()

    def stop_wanted(self) -> bool:
        return self._context.stop_wanted

    def progress(self, fraction: float, message: str) -> None:
        self._context.progress(INVENTED_SHARE + (1 - INVENTED_SHARE) * fraction, f"discriminator: {message}")

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        del values
        if time.monotonic() - self._told >= 1.0 and not self._context.stop_wanted:
            self._told = time.monotonic()
            self.progress(0.1 + 0.75 * step / total, f"step {step} of {total}")

    def checkpoint(self, folder: Path, step: int) -> bool:
        del step
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(folder, self._folder)
        return self._job.save()
