"""The task transcript-classification: whether a transcript is long non-coding RNA or codes for a protein."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from artifacts.base_model import inspect_base
from artifacts.errors import FieldError, RequestInvalid
from artifacts.layout import WEIGHTS_NAME
from train.data import DataFile, Examples, check_enough, counts
from train.evaluation import Scores
from train.rows import iter_rows
from train.settings import EvaluationSettings, TranscriptClassificationTask
from train.splits import split_of
from train.tasks.classification import ClassExample, Classification
from train.tasks.labels import Labels
from train.tasks.protocol import TaskContext
from train.tasks.rows import RowFaults, row_limit
from train.tasks.text_batches import device_of, moved
from train.tasks.transcript_scores import VIEWS, TranscriptScores
from train.transcripts.classes import NAMES
from train.transcripts.controls import control_logits, counts_of
from train.transcripts.groups import groups_of
from train.transcripts.kmers import KmerTokens, write_tokenizer
from train.transcripts.nucleotides import OTHER, codes_of
from train.transcripts.reading_frames import Frame, longest_frame, part_of
from train.transcripts.shuffling import dinucleotide_shuffle

if TYPE_CHECKING:
    from numpy.typing import NDArray

KMERS_KEY = "kmers"
"""Where the metadata of an adapter's weights say how sequences are read, as a JSON object."""
MOST_OTHER_LETTERS = 0.05
"""Share of letters besides A C G T above which a record is left out."""
_NO_FALL = 0.02  # of the AUROC on shuffled inputs, that says nothing
_TELLING = 0.6  # the AUROC of a control by length above which lengths tell the classes apart


@dataclass(frozen=True, slots=True)
class TranscriptView(ClassExample):
    """A whole transcript, or its longest reading frame.

    Attributes:
        record: the number of its row.
        view: its place in `VIEWS`.
        group: the name of the group that is not parted.
        nucleotides: before a cut.
        frame: nucleotides of the longest reading frame in it.
        counts: (64,) of its 3-mers.
        read: (letters,) what its tokens are of, after a cut.
    """

    record: int
    view: int
    group: str
    nucleotides: int
    frame: int
    counts: NDArray[np.int32]
    read: NDArray[np.uint8]

    @property
    def non_coding(self) -> int:
        return int(self.labels[0])


@dataclass(slots=True)
class _Reading:
    """What became of the records."""

    left_out: Counter[str]
    other_labels: Counter[str]
    cut: int = 0


class TranscriptClassification(Classification[TranscriptClassificationTask]):
    """k-mers as tokens; the classifier and, where there is one, the pooler before it are trained whole.

    A base model that was trained to tell the same two classes apart keeps its classifier.
    """

    peft_type: ClassVar[str | None] = "SEQ_CLS"

    def __init__(self, settings: TranscriptClassificationTask, context: TaskContext) -> None:
        super().__init__(settings, context)
        self.kmers = KmerTokens(self.tokenizer, settings.k)
        self.labels = Labels.ordered(NAMES)
        self.controls: Mapping[str, Mapping[str, float]] = {}
        self.shuffled: Mapping[str, float] = {}

    def auto_class(self) -> Any:
        return AutoModelForSequenceClassification

    def read(self, file: DataFile, evaluation: EvaluationSettings) -> Examples:
        self.limit = row_limit(self.settings.max_length, self.base.config())
        reading = _Reading(Counter(), Counter())
        views = self._grouped(list(self._views(file, reading)))
        held_out = {
            view.group
            for view in views
            if split_of({"group": view.group}, evaluation.validation_fraction) == "validation"
        }
        train = tuple(view for view in views if view.group not in held_out)
        # Files have one class after the other: in the order of the groups' digests both come early.
        validation = tuple(sorted((view for view in views if view.group in held_out), key=lambda view: view.group))
        _check_classes(train, "training")
        if evaluation.validation_fraction:
            _check_classes(validation, "validation")
        measured = _first_records(validation, evaluation.max_rows)
        if measured:
            _check_classes(measured, "measured")
            fitted = control_logits(train, measured)
            self.controls = {name: _scores(measured, logits).to_dict() for name, logits in fitted.items()}
        report = counts(
            train,
            validation,
            evaluation,
            labels=list(NAMES),
            transcripts={"training": _records(train), "validation": _records(validation)},
            groups={"training": len({view.group for view in train}), "validation": len(held_out)},
            views={VIEWS[place]: sum(view.view == place for view in views) for place in range(len(VIEWS))},
            training_tokens=sum(view.length for view in train),
            longest_row=max(view.length for view in train),
            row_limit=self.limit,
            left_out=dict(reading.left_out),
            other_labels=dict(reading.other_labels.most_common(20)),
            cut_views=reading.cut,
            controls=self.controls,
        )
        return Examples(train, measured, report | {"measured_rows": _records(measured)})

    def _views(self, file: DataFile, reading: _Reading) -> Iterator[tuple[TranscriptView, tuple[str, ...]]]:
        """The views of all records, each with the keys by which it is grouped."""
        settings, faults = self.settings, RowFaults()
        classes = dict.fromkeys(settings.positive_labels, 1) | dict.fromkeys(settings.negative_labels, 0)
        for number, row in enumerate(iter_rows(file.path, file.format), 1):
            sequence, label = row.get(settings.sequence_column), row.get(settings.label_column)
            if not isinstance(sequence, str) or not sequence:
                faults.add(number, f"`{settings.sequence_column}` is no text, or empty")
                continue
            if label is None or label == "" or isinstance(label, bool) or not isinstance(label, str | int):
                faults.add(number, f"`{settings.label_column}` is no biotype")
                continue
            if str(label) not in classes:
                reading.other_labels[str(label)[:80]] += 1
                continue
            columns = {"gene": settings.gene_column, "id": settings.id_column}
            names = [f"{what}:{row[name]}" for what, name in columns.items() if row.get(name) not in (None, "")]
            yield from self._views_of(number, sequence, classes[str(label)], names, reading)
        faults.check("Give every record its biotype, in FASTA by label=… in the header, or name other columns.")

    def _views_of(
        self, number: int, sequence: str, non_coding: int, names: Sequence[str], reading: _Reading
    ) -> Iterator[tuple[TranscriptView, tuple[str, ...]]]:
        settings, codes = self.settings, codes_of(sequence)
        if len(codes) < settings.minimum_length:
            reading.left_out["short"] += 1
            return
        if np.count_nonzero(codes == OTHER) > MOST_OTHER_LETTERS * len(codes):
            reading.left_out["other_letters"] += 1
            return
        frame = longest_frame(codes, settings.six_frames)
        parts: list[tuple[int, NDArray[np.uint8]]] = []
        if settings.views != "partial":
            parts.append((0, codes))
        if settings.views != "full":
            if frame is not None and frame.length >= settings.minimum_length:
                parts.append((1, part_of(codes, frame)))
            else:
                reading.left_out["no_reading_frame"] += 1
        for view, part in parts:
            found = self._view(number, part, view, non_coding, frame, reading)
            if found is not None:
                # What looks the same to the model belongs together, whatever it is called.
                yield found, (*names, f"input:{hashlib.sha256(found.ids.tobytes()).hexdigest()}", f"record:{number}")

    def _view(
        self,
        number: int,
        codes: NDArray[np.uint8],
        view: int,
        non_coding: int,
        frame: Frame | None,
        reading: _Reading,
    ) -> TranscriptView | None:
        """None if it is too long and is to be left out."""
        ids = self.kmers.encode(codes, self.settings.stride)
        if len(ids) > self.limit:
            if self.settings.overlong == "error":
                problem = f"the input of record {number} has {len(ids)} tokens, {self.limit} are allowed"
                raise RequestInvalid(
                    f"T{problem[1:]}.",
                    hint="Choose task.overlong truncate or drop, or raise task.max_length.",
                    errors=[FieldError("/task/overlong", problem)],
                )
            if self.settings.overlong == "drop":
                reading.left_out["long"] += 1
                return None
            reading.cut += 1
        return TranscriptView(
            ids=self.kmers.cut(ids, self.limit),
            kinds=None,
            labels=np.array([non_coding], np.int32),
            record=number,
            view=view,
            group="",
            nucleotides=len(codes),
            frame=0 if frame is None else frame.length,
            counts=counts_of(codes),
            read=codes[: (min(len(ids), self.limit) - 3) * self.settings.stride + self.settings.k].copy(),
        )

    def _grouped(self, found: Sequence[tuple[TranscriptView, tuple[str, ...]]]) -> list[TranscriptView]:
        """The views with the names of their groups, of which the numbers of records are no part."""
        names = groups_of([keys for _, keys in found])
        return [
            replace(view, group=hashlib.sha256(name.encode()).hexdigest())
            for (view, _), name in zip(found, names, strict=True)
        ]

    def keeps_head(self, config: Any) -> bool:
        return tuple(config.id2label.get(place) for place in range(len(NAMES))) == NAMES and len(config.id2label) == 2

    def trained_whole(self, model: nn.Module) -> Sequence[str]:
        """BERT's pooler is a part of its classifier."""
        return [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "pooler"]

    def collate_labels(self, examples: Sequence[ClassExample], shape: tuple[int, int]) -> Tensor:
        return torch.from_numpy(np.concatenate([example.labels for example in examples]).astype(np.int64))

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        examples: Sequence[TranscriptView],
        evaluation: EvaluationSettings,
        tick: Callable[[int], None],
    ) -> TranscriptScores:
        """Views of about one length go together: less is padded."""
        model.eval()
        logits = np.zeros(len(examples))
        order = sorted(range(len(examples)), key=lambda place: examples[place].length)
        size = self.training.batch_size
        for start in range(0, len(order), size):
            tick(start)
            places = order[start : start + size]
            batch = moved(self.collate([examples[place] for place in places]), device_of(model))
            del batch["labels"]
            found = model(**batch).logits.double()
            logits[places] = (found[:, 1] - found[:, 0]).cpu().numpy()
        return _scores(examples, logits)

    def measure_more(
        self, model: nn.Module, examples: Sequence[TranscriptView], evaluation: EvaluationSettings
    ) -> Mapping[str, Any]:
        """The same inputs with their letters in another order, the dinucleotides kept: what order tells is gone."""
        shuffled = [self._shuffled(view) for view in examples]
        self.shuffled = self.score(model, shuffled, evaluation, lambda _: None).to_dict()
        return {"shuffled": self.shuffled}

    def _shuffled(self, view: TranscriptView) -> TranscriptView:
        drawn = np.random.default_rng([self.seed, view.record, view.view])
        codes = dinucleotide_shuffle(view.read, drawn)
        return replace(view, ids=self.kmers.encode(codes, self.settings.stride), read=codes)

    def scores_of(self, columns: Mapping[str, Any]) -> TranscriptScores:
        return TranscriptScores.of(columns)

    def remarks(self, after: Scores | None) -> Sequence[str]:
        """What the controls make of the figures: that lengths give the classes away, or that the model is no better."""
        if after is None:
            return []
        reached, found = after.to_dict()["auroc"], []
        for name, told in (("length", "the length alone"), ("orf_length", "the longest reading frame's length alone")):
            if self.controls[name]["auroc"] > _TELLING:
                found.append(
                    f"On these rows {told} reaches an AUROC of {self.controls[name]['auroc']:.3f}: part of what the "
                    "classifier learns may be that. Windows of one length show what else it learned."
                )
        for name, figures in self.controls.items():
            if reached <= figures["auroc"]:
                found.append(
                    f"The classifier's AUROC of {reached:.3f} is not above the {figures['auroc']:.3f} of a logistic "
                    f"regression on {_WORDS[name]}."
                )
        if self.shuffled and self.shuffled["auroc"] >= reached - _NO_FALL:
            found.append(
                "With the nucleotides of every input shuffled, the counts of the dinucleotides kept, the classifier "
                f"still reaches an AUROC of {self.shuffled['auroc']:.3f}: it goes by composition and not by order."
            )
        return found

    def finish(self, directory: Path) -> None:
        """An adapter says how sequences are read; its tokenizer, or that of a whole model, lies beside the weights."""
        vocabulary = hashlib.sha256(self.kmers.ids.tobytes()).hexdigest()
        place = Path(self.base.location)
        read = {
            "k": self.settings.k,
            "stride": self.settings.stride,
            "max_length": self.limit,
            "views": self.settings.views,
            "vocabulary_sha256": vocabulary,
            "base_sha256": inspect_base(place).weights_digest if place.is_dir() else None,
        }
        if (directory / WEIGHTS_NAME).is_file():
            self.tell(directory, {KMERS_KEY: json.dumps(read, sort_keys=True)})
        write_tokenizer(self.tokenizer, directory)


_WORDS = {
    "length": "the length",
    "orf_length": "the length of the longest reading frame",
    "kmer_counts": "3-mer counts",
}


def _scores(views: Sequence[TranscriptView], logits: NDArray[np.float64]) -> TranscriptScores:
    places = {record: place for place, record in enumerate(dict.fromkeys(view.record for view in views))}
    return TranscriptScores(
        count=len(places),
        row=np.array([places[view.record] for view in views], np.int64),
        view=np.array([view.view for view in views], np.int64),
        truth=np.array([view.non_coding for view in views], np.int64),
        logit=logits,
    )


def _records(views: Sequence[TranscriptView]) -> int:
    return len({view.record for view in views})


def _first_records(views: Sequence[TranscriptView], most: int) -> tuple[TranscriptView, ...]:
    taken = set(list(dict.fromkeys(view.record for view in views))[:most])
    return tuple(view for view in views if view.record in taken)


def _check_classes(views: Sequence[TranscriptView], what: str) -> None:
    """Raises RequestInvalid when views of a class are lacking."""
    check_enough(views, what)
    here = {view.non_coding for view in views}
    if len(here) < len(NAMES):
        problem = f"the {what} rows have no {NAMES[1 - here.pop()]}"
        raise RequestInvalid(
            f"T{problem[1:]}.",
            hint="Give transcripts of both classes; task.positive_labels and task.negative_labels say which labels "
            "they have. Few groups need a larger evaluation.validation_fraction.",
            errors=[FieldError("/dataset", problem)],
        )
