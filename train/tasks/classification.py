"""What the two classification tasks share: a new head that is trained whole, its loss, and how it is measured."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from artifacts.errors import FieldError, RequestInvalid
from artifacts.layout import read_layout
from artifacts.safetensors_header import read_header
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
from train.data import DataFile, Examples, SplitRows, counts, listed
from train.settings import ClassificationSettings, EvaluationSettings
from train.tasks.class_scores import ClassScores
from train.tasks.labels import Label, Labels, of_one_kind
from train.tasks.protocol import Loss, Task, TaskContext
from train.tasks.rows import IGNORED, RowFaults, RowProblemError, encode_rows, row_limit
from train.tasks.text_batches import device_of, moved, padding_of, ready_transformer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedModel

LABELS_KEY = "labels"
"""Where the metadata of an adapter's weights have its labels, as a JSON list: place in the list = class."""

_STANDARD_DEVIATION = 0.02  # of a head's weights, if the base's configuration has no initializer_range
_WEIGHTS = "adapter_model.safetensors"

S = TypeVar("S", bound=ClassificationSettings)


@dataclass(frozen=True, slots=True)
class ClassExample:
    """A row as tokens.

    Attributes:
        ids: (length,) token ids.
        kinds: (length,) which of two texts a token belongs to; None if the base model does not ask.
        labels: (1,) the class of the text, or (length,) the classes of tokens, `IGNORED` where none is counted.
    """

    ids: NDArray[np.int32]
    kinds: NDArray[np.int32] | None
    labels: NDArray[np.int32]

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def counted(self) -> int:
        return int((self.labels != IGNORED).sum())


class Classification(Task[S], Generic[S]):
    """The head is new, the same for the same seed, float32, trained whole and stored with the adapter."""

    labels: Labels

    def __init__(self, settings: S, context: TaskContext) -> None:
        super().__init__(settings, context)
        self.tokenizer = self.base.tokenizer()
        self.padding = padding_of(self.tokenizer)
        self._whole: tuple[str, ...] = ()

    @abstractmethod
    def auto_class(self) -> Any:
        """The class of transformers that puts the head onto the base."""

    def keeps_head(self, config: PretrainedConfig) -> bool:
        """Whether the base model with this configuration keeps its head, if it has one."""
        del config
        return False

    def trained_whole(self, model: nn.Module) -> Sequence[str]:
        """Paths of modules besides the head that are trained as they are."""
        del model
        return ()

    def load(self) -> nn.Module:
        kept = self.keeps_head(self.base.config())
        names = {place: str(label) for place, label in enumerate(self.labels.names)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # for weights that the base lacks
            model, info = self.base.load_with_info(
                self.auto_class(),
                "model that transformers can put a classifier on",
                dtype=self.training.precision,
                device="cpu",
                num_labels=len(names),
                id2label=names,
                label2id={label: place for place, label in names.items()},
                problem_type=None,
                ignore_mismatched_sizes=True,
            )
            heads = _heads(model)
            lacking = {key.rpartition(".")[0] for key in info["missing_keys"]}
            for path in heads:
                if kept and not any(_inside(other, path) for other in lacking):
                    continue
                _renew(model.get_submodule(path), getattr(model.config, "initializer_range", _STANDARD_DEVIATION))
        heads = (*heads, *self.trained_whole(model))
        others = {path for path in lacking if not any(_inside(path, head) for head in heads)}
        self._whole = (*heads, *sorted(others))
        for path in self._whole:
            model.get_submodule(path).to(torch.float32).register_forward_pre_hook(_take_float32)
        model.config.pad_token_id = self.padding  # how a causal model finds the last token of a row
        placed: nn.Module = model.to(self.device)
        return placed

    def whole(self, model: nn.Module) -> Sequence[str]:
        return self._whole

    def check_start(self, directory: Path) -> None:
        told = read_header(read_layout(directory).weights_path).metadata.get(LABELS_KEY)
        if told is not None and json.loads(told) != list(self.labels.names):
            problem = f"its labels are {told[:200]}, those of the training rows are others"
            raise RequestInvalid(
                f"The adapter can not be trained on: {problem}.",
                hint="Give rows with the same labels, or begin anew.",
                errors=[FieldError("/continue_from", problem)],
            )

    def before_training(self, model: Any) -> None:
        ready_transformer(model, self.training)

    def collate(self, examples: Sequence[ClassExample]) -> dict[str, Tensor]:
        """input_ids, attention_mask and, if the base asks for them, token_type_ids: (rows, longest) each."""
        shape = (len(examples), max(example.length for example in examples))
        ids, mask = np.full(shape, self.padding, np.int64), np.zeros(shape, np.int64)
        kinds = np.zeros(shape, np.int64)
        for row, example in enumerate(examples):
            ids[row, : example.length], mask[row, : example.length] = example.ids, 1
            if example.kinds is not None:
                kinds[row, : example.length] = example.kinds
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if examples[0].kinds is not None:
            batch["token_type_ids"] = torch.from_numpy(kinds)
        return batch | {"labels": self.collate_labels(examples, shape)}

    @abstractmethod
    def collate_labels(self, examples: Sequence[ClassExample], shape: tuple[int, int]) -> Tensor:
        """(rows,) of texts, or (rows, longest) of tokens."""

    def loss(self) -> Loss:
        return _loss

    def tokens(self, example: ClassExample) -> int:
        return example.length

    @torch.no_grad()
    def predict(self, model: nn.Module, examples: Sequence[ClassExample]) -> list[Tensor]:
        """The logits: (labels,) of each text, or (length, labels) of its tokens."""
        found = []
        for example in examples:
            batch = moved(self.collate([example]), device_of(model))
            del batch["labels"]
            found.append(model(**batch).logits[0].float().cpu())
        return found

    def finish(self, directory: Path) -> None:
        """The labels go with the weights."""
        self.tell(directory, {})

    def tell(self, directory: Path, more: Mapping[str, str]) -> None:
        """Write the labels, and more, into the metadata of the adapter's weights."""
        path = directory / _WEIGHTS
        header, tensors = read_header(path), dict(sorted(load_file(path).items()))
        metadata = {**header.metadata, LABELS_KEY: json.dumps(list(self.labels.names), ensure_ascii=False), **more}
        entries = [TensorEntry(name, header.tensors[name].dtype, tuple(value.shape)) for name, value in tensors.items()]
        # safetensors itself writes several entries of metadata in an order that changes from file to file.
        with SafetensorsWriter(path, entries, metadata) as writer:
            for name, value in tensors.items():
                writer.write(name, value)


class RowClassification(Classification[S], Generic[S]):
    """The rows say what the labels are, and each becomes an example."""

    @abstractmethod
    def labels_in(self, row: Mapping[str, Any]) -> Sequence[Label]:
        """The labels of a row. Raises RowProblemError."""

    @abstractmethod
    def encode(self, row: Mapping[str, Any], limit: int | None) -> ClassExample:
        """An example of a row, cut at the limit. Raises RowProblemError."""

    def read(self, file: DataFile, evaluation: EvaluationSettings) -> Examples:
        fraction = evaluation.validation_fraction
        self.labels = self._find_labels(SplitRows(file, fraction))
        self.labels.check(self.settings.label_name)
        limit = row_limit(self.settings.max_length, self.base.config())
        rows = SplitRows(file, fraction, evaluation.group_column)
        encoded = encode_rows(rows, self.encode, self.settings.overlong, limit)
        train, validation = rows.parted(encoded.numbers, encoded.examples)
        report = counts(
            train,
            validation,
            evaluation,
            labels=list(self.labels.names),
            training_tokens=sum(example.length for example in train),
            counted_labels=sum(example.counted for example in train),
            longest_row=max(example.length for example in train),
            row_limit=limit,
            dropped_rows=listed(encoded.dropped),
            cut_rows=listed(encoded.cut),
        )
        groups = rows.groups(encoded.numbers, evaluation.max_rows)
        return Examples(train, validation[: evaluation.max_rows], report, groups)

    def _find_labels(self, rows: SplitRows) -> Labels:
        """Of the training rows; every row is looked at."""
        faults = RowFaults()
        found: set[Label] = set()
        first: Label | None = None
        for number, row in rows:
            try:
                labels = self.labels_in(row)
                if labels:
                    first = labels[0] if first is None else first
                    of_one_kind(labels, first, self.settings.label_name)
            except RowProblemError as error:
                faults.add(number, str(error))
            else:
                found.update(() if number in rows.held_out else labels)
        faults.check("Correct these rows, or name another column in the task.")
        return Labels(found)

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        examples: Sequence[ClassExample],
        evaluation: EvaluationSettings,
        tick: Callable[[int], None],
    ) -> ClassScores:
        model.eval()
        parts: list[tuple[NDArray[np.int64], ...]] = []
        losses: list[NDArray[np.float64]] = []
        size = self.training.batch_size
        for start in range(0, len(examples), size):
            tick(start)
            batch = moved(self.collate(examples[start : start + size]), device_of(model))
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            counted = labels != IGNORED
            rows = torch.arange(len(labels), device=labels.device).view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
            chosen, truth = logits[counted], labels[counted]
            parts.append(tuple(value.cpu().numpy() for value in (rows[counted] + start, truth, chosen.argmax(dim=-1))))
            losses.append(functional.cross_entropy(chosen.double(), truth, reduction="none").cpu().numpy())
        places, right, guessed = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ClassScores(len(examples), len(self.labels), places, right, guessed, np.concatenate(losses))

    def scores_of(self, columns: Mapping[str, Any]) -> ClassScores:
        return ClassScores.of(columns)


def _loss(outputs: Any, labels: Tensor, items: Tensor) -> Tensor:
    logits = outputs.logits.float()
    return functional.cross_entropy(
        logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORED, reduction="sum"
    ) / items.to(logits.device)


def _heads(model: PreTrainedModel) -> tuple[str, ...]:
    """The parts with parameters that are not the base model."""
    parts: Iterable[tuple[str, nn.Module]] = model.named_children()
    return tuple(
        name for name, part in parts if name != model.base_model_prefix and next(part.parameters(), None) is not None
    )


def _renew(head: nn.Module, deviation: float) -> None:
    """First values: normal weights without bias, and whatever other layers begin with."""
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif callable(reset := getattr(layer, "reset_parameters", None)):
            reset()


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")


def _take_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A head keeps its own precision, whatever the base has."""
    del module
    return tuple(
        value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    )
