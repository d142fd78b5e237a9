"""What the stages of one transfer share: what was given, where outputs are kept, and the one base model in memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from artifacts.errors import FieldError, TransferRefused
from transfer.evaluation import Item
from transfer.filters.discriminator import DiscriminatorRecipe
from transfer.labelling import Labeller
from transfer.options import DistilOptions
from transfer.prompts import PromptFormat
from transfer.source_model import load_adapted, load_base, stands_alone
from transfer.stage_files import StageFiles
from transfer.weight_transfer import BaseWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE_SHARES: Mapping[str, float] = {
    "generate": 0.05,
    "filter": 0.2,
    "label": 0.4,
    "move": 0.45,
    "train": 0.5,
    "evaluate": 0.85,
}
"""Where a stage begins on a bar from 0 to 1."""
TASK, DISCRIMINATOR = "task", "discriminator"
"""Names of the adapters on the source base."""


@dataclass(frozen=True, slots=True)
class StoredDiscriminator:
    """A discriminator: its folder, its digest, how it is asked, and how well it told held-out inputs apart."""

    folder: Path
    digest: str
    recipe: DiscriminatorRecipe
    auc: float | None = None


@dataclass(frozen=True, slots=True)
class TransferInputs:
    """Everything that a transfer is given. The training data of the source adapter is not among it.

    Attributes:
        adapter: folder of the source adapter.
        key: `transfer.identity.TransferIdentity.key`, from which all random numbers come.
        inputs: that the owner has kept, for the method refresh.
        holdout: items of the owner's to measure with.
        micro_batches: parts that a batch of the training is computed in: for less memory, with the same sums.
        folder: the transfer's own: stage outputs, checkpoints and the new adapter.
        cache: of decomposed base weights, shared by all transfers.
    """

    adapter: Path
    source: BaseWeights
    target: BaseWeights
    prompt_format: PromptFormat
    key: str
    seed: int
    folder: Path
    cache: Path
    seeds: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    discriminator: StoredDiscriminator | None = None
    holdout: tuple[Item, ...] = ()
    device: str = "cpu"
    micro_batches: int = 1


class TransferObserver(Protocol):
    """Who follows a transfer."""

    def unit(self, stage: str, message: str) -> None:
        """A unit of a stage begins; what is done before is kept. Raises to stop the transfer."""

    def stop_wanted(self) -> bool:
        """Whether a training shall end after its step, with a checkpoint."""

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """A step of the new adapter's training is done; trainings of controls are not told. May raise as `unit`."""

    def kept(self) -> None:
        """A checkpoint of a training lies in the transfer's folder. May raise as `unit`."""


@dataclass(slots=True)
class Resident:
    """At most one base model in memory, with whatever adapters it was loaded with."""

    inputs: TransferInputs
    _key: object = None
    _held: Any = None
    _tokenizers: dict[str, Any] = field(default_factory=dict)

    def source(self, adapter: str = TASK) -> Any:
        """The source base with one of its adapters active."""
        folders = {TASK: self.inputs.adapter}
        if self.inputs.discriminator is not None:
            folders[DISCRIMINATOR] = self.inputs.discriminator.folder
        key: object = "source"
        if any(stands_alone(folder) for folder in folders.values()):
            folders, key = {adapter: folders[adapter]}, ("source", adapter)
        model = self._get(key, lambda: load_adapted(self.inputs.source.files, folders, device=self.inputs.device))
        model.set_adapter(adapter)
        # Activating an adapter makes it trainable; nothing is trained here.
        return model.requires_grad_(False).eval()

    @contextmanager
    def plain_source(self) -> Iterator[Any]:
        """The source base without an adapter."""
        model = self.source()
        with model.disable_adapter():
            yield model

    def target(self, adapter: Path | None = None) -> Any:
        """The target base, with an adapter or without."""
        files, device = self.inputs.target.files, self.inputs.device
        if adapter is None:
            return self._get("target", lambda: load_base(files, device=device))
        return self._get(("target", adapter), lambda: load_adapted(files, {"moved": adapter}, device=device))

    def source_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer("source")

    def target_tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer("target")

    def free(self) -> None:
        """Forget the model: a training is going to load its own."""
        self._key = self._held = None
        gc.collect()

    def _get(self, key: object, load: Any) -> Any:
        if self._key != key:
            self.free()
            self._held, self._key = load(), key
        return self._held

    def _tokenizer(self, side: str) -> Any:
        if side not in self._tokenizers:
            base = self.inputs.source if side == "source" else self.inputs.target
            self._tokenizers[side] = base.files.tokenizer()
        return self._tokenizers[side]


@dataclass(frozen=True, slots=True)
class Bench:
    """One transfer at work."""

    inputs: TransferInputs
    options: DistilOptions
    files: StageFiles
    resident: Resident
    observer: TransferObserver

    def labeller(self) -> Labeller:
        """The source adapter, ready to answer."""
        options = self.options
        return Labeller(
            self.resident.source(TASK),
            self.resident.source_tokenizer(),
            self.inputs.prompt_format,
            max_new_tokens=options.answer_tokens,
            stop=options.answer_stop,
            batch_size=options.answer_batch,
        )

    @property
    def answer_settings(self) -> list[Any]:
        """What decides an answer besides the input: part of the input of every unit that answers."""
        options = self.options
        return [
            self.inputs.key,
            self.inputs.prompt_format.model_dump(),
            options.answer_tokens,
            options.answer_stop,
            options.answer_batch,
        ]


def required_seeds(inputs: TransferInputs) -> tuple[str, ...]:
    """Raises TransferRefused when there are none."""
    if not inputs.seeds:
        raise TransferRefused(
            "The adapter has no seeds.",
            hint="Give 3 to 50 examples of the task's inputs, without answers.",
            errors=[FieldError("/seeds", "are needed")],
        )
    return inputs.seeds
