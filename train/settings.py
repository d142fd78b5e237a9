"""What a training takes besides its method: the task, the loop and the evaluation. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StringConstraints,
    TypeAdapter,
    model_validator,
)

from artifacts.menu import Number
from train.metrics import Metric

Column = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Share = Annotated[Number, Field(ge=0, le=0.5)]
Count = Annotated[StrictInt, Field(ge=1, le=10_000_000)]
Targets = Literal["all-linear"] | list[str]
SECONDS_PER_DAY = 86400


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class _TaskSettings(_Settings):
    """What all tasks have in common."""

    metrics: ClassVar[tuple[Metric, ...]]
    """What an evaluation measures; exact_match only if `EvaluationSettings.exact_match` asks for it."""


class TextTask(_TaskSettings):
    """What the tasks of text have in common."""

    max_length: Annotated[StrictInt, Field(ge=2, le=1_048_576)] = Field(
        1024, description="Longest row, tokens; never above what the base model was made for."
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="What becomes of longer rows: refuse and name them, leave them out, or cut their end off."
    )

    @property
    def positions(self) -> int:
        """Of the longest row: what activations grow with."""
        return self.max_length

    @property
    def default_targets(self) -> Targets:
        """The layers that are adapted if the request names none."""
        return "all-linear"


class CausalLmTask(TextTask):
    """Predict the next token. A row has `messages` (chat), or `prompt` and `completion`, or `text`.

    The loss counts what the model has to say: of a chat the assistant's turns, of a pair the completion, of a text all.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ("loss", "perplexity", "exact_match")

    type: Literal["causal-lm"] = "causal-lm"
    messages_column: Column = Field("messages", description="Column with a list of {role, content}.")
    prompt_column: Column = Field("prompt", description="Column with what the model is given.")
    completion_column: Column = Field("completion", description="Column with what it shall answer.")
    text_column: Column = Field("text", description="Column with plain text.")
    packing: StrictBool = Field(
        False,
        description="Join training rows up to max_length; none sees another. Then training.batch_size counts packs: "
        "faster where rows are much shorter than max_length.",
    )


def is_packed(task: _TaskSettings) -> bool:
    """Whether rows are joined."""
    return isinstance(task, CausalLmTask) and task.packing


class ClassificationSettings(TextTask):
    """What the classification tasks have in common."""

    metrics: ClassVar[tuple[Metric, ...]] = ("loss", "accuracy", "macro_f1", "mcc")

    max_length: Annotated[StrictInt, Field(ge=2, le=1_048_576)] = Field(
        512, description="Longest row, tokens; never above what the base model was made for."
    )

    @property
    def label_name(self) -> str:
        """The column that has the labels."""
        raise TypeError(f"{type(self).__name__} is no task")


class SequenceClassificationTask(ClassificationSettings):
    """Tell which of several labels a text has. A row has `text` and `label`, and may have `text_pair`.

    The labels are those of the training rows. The base model gets a new classifier, which is trained whole and stored
    in the adapter; a causal model classifies by a text's last token.
    """

    type: Literal["sequence-classification"] = "sequence-classification"
    text_column: Column = Field("text", description="Column with the text.")
    text_pair_column: Column | None = Field(
        None, description="Column with a second text; unset, `text_pair` where a row has one."
    )
    label_column: Column = Field("label", description="Column with the label: text or a whole number.")

    @property
    def label_name(self) -> str:
        return self.label_column


class TokenClassificationTask(ClassificationSettings):
    """Tell which tag every token of a text has. A row has `tokens` and as many `tags`.

    A token that the base's tokenizer cuts into pieces counts at its first piece. The tags are those of the training
    rows; the classifier is new, trained whole and stored in the adapter.
    """

    type: Literal["token-classification"] = "token-classification"
    tokens_column: Column = Field("tokens", description="Column with a list of text.")
    tags_column: Column = Field("tags", description="Column with a list of tags: all text, or all whole numbers.")

    @property
    def label_name(self) -> str:
        return self.tags_column


class TranscriptClassificationTask(ClassificationSettings):
    """Tell long non-coding RNA from protein-coding mRNA by nucleotides alone (the task of arXiv:2411.08073). A row has
    `sequence` and `label`, its biotype, and may have `id` and `gene`; FASTA gives all four.

    The base model reads overlapping k-mers: `rankwise models kmers` makes one. Views of a gene, of a transcript and
    of equal sequences are held out together. U is read as T, and lower case as upper case.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        "loss",
        "accuracy",
        "sensitivity",
        "specificity",
        "precision",
        "f1",
        "macro_f1",
        "mcc",
        "auroc",
    )

    type: Literal["transcript-classification"] = "transcript-classification"
    max_length: Annotated[StrictInt, Field(ge=16, le=1_048_576)] = Field(
        1536, description="Longest input, tokens with [CLS] and [SEP]; never above what the base model was made for."
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "truncate", description="What becomes of longer inputs: cut their 3' end off, leave them out, or refuse them."
    )
    k: Annotated[StrictInt, Field(ge=1, le=6)] = Field(3, description="Nucleotides of a token.")
    stride: Annotated[StrictInt, Field(ge=1, le=6)] = Field(1, description="Nucleotides from a token to the next.")
    views: Literal["full", "partial", "both"] = Field(
        "both",
        description="What is read of a transcript: all of it, its longest open reading frame, or either as an input of "
        "its own.",
    )
    minimum_length: Annotated[StrictInt, Field(ge=16, le=1_000_000)] = Field(
        100, description="Shortest transcript and shortest reading frame, nucleotides; shorter ones are left out."
    )
    six_frames: StrictBool = Field(
        False,
        description="Look for reading frames in the reverse complement too, as the published code does; wrong for "
        "transcripts whose strand is known.",
    )
    positive_labels: Annotated[list[Column], Field(min_length=1, max_length=100)] = Field(
        ["lncRNA", "lincRNA", "1"], description="Labels of non-coding transcripts, class 1."
    )
    negative_labels: Annotated[list[Column], Field(min_length=1, max_length=100)] = Field(
        ["mRNA", "protein_coding", "0"],
        description="Labels of coding transcripts, class 0. Rows with any other label are left out and counted.",
    )
    sequence_column: Column = Field("sequence", description="Column with the nucleotides.")
    label_column: Column = Field("label", description="Column with the biotype: text or a whole number.")
    id_column: Column = Field("id", description="Column with the transcript's name, where there is one.")
    gene_column: Column = Field("gene", description="Column with the gene's name, where there is one.")

    @property
    def label_name(self) -> str:
        return self.label_column

    @model_validator(mode="after")
    def _two_classes(self) -> TranscriptClassificationTask:
        both = set(self.positive_labels) & set(self.negative_labels)
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is in positive_labels and in negative_labels")
        return self


class TextToImageTask(_TaskSettings):
    """Predict the noise in images from their captions. The dataset is a zip of images, the base model a folder of a
    StableDiffusionPipeline, of which the UNet is adapted.

    Images are scaled and cut to a square in the middle; what VAE and text encoder make of them is computed once.
    """

    metrics: ClassVar[tuple[Metric, ...]] = ("loss",)

    type: Literal["text-to-image"] = "text-to-image"
    resolution: Annotated[StrictInt, Field(ge=16, le=2048, multiple_of=8)] = Field(
        512,
        description="Width and height of the images, pixels; a multiple of 8 (of the VAE's factor, if it is larger).",
    )
    prediction: Literal["auto", "epsilon", "v-prediction"] = Field(
        "auto", description="What the UNet predicts: the noise, or v (arXiv:2202.00512); auto: as its scheduler says."
    )
    noise_offset: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0,
        description="Standard deviation of noise that is one value for a whole channel: for dark or light images.",
    )
    min_snr_gamma: Annotated[Number, Field(gt=0, le=1000)] | None = Field(
        None, description="γ of min-SNR weighting (arXiv:2303.09556; 5 there); unset, all noise levels weigh the same."
    )
    prompt_dropout: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the rows of a step whose caption is taken as empty, for guidance without a classifier.",
    )
    evaluation_draws: Annotated[StrictInt, Field(ge=1, le=100)] = Field(
        4, description="Noise levels, each with a fixed noise, at which every validation image is measured."
    )

    @property
    def positions(self) -> int:
        """Of an image, at the layers of the highest resolution: what activations grow with."""
        return (self.resolution // 8) ** 2

    @property
    def default_targets(self) -> Targets:
        """The projections of attention."""
        return ["to_q", "to_k", "to_v", "to_out.0"]


AnyTask = (
    CausalLmTask | SequenceClassificationTask | TokenClassificationTask | TranscriptClassificationTask | TextToImageTask
)
TaskSettings = Annotated[AnyTask, Field(discriminator="type")]
TaskName = Literal[
    "causal-lm", "sequence-classification", "token-classification", "transcript-classification", "text-to-image"
]
TASKS: Mapping[str, type[AnyTask]] = {
    "causal-lm": CausalLmTask,
    "sequence-classification": SequenceClassificationTask,
    "token-classification": TokenClassificationTask,
    "transcript-classification": TranscriptClassificationTask,
    "text-to-image": TextToImageTask,
}
"""Every task by its name."""


class EarlyStopping(_Settings):
    """Measure the validation rows while training, end when nothing is gained, and keep the adapter of the best step."""

    metric: Metric = Field(
        "loss",
        description="Figure of the evaluation that is gone by, one that the task has. causal-lm: loss, perplexity, "
        "exact_match (writes answers: slow); classification: loss, accuracy, macro_f1, mcc, of transcripts also "
        "sensitivity, specificity, precision, f1, auroc; text-to-image: loss.",
    )
    every_steps: Count = Field(50, description="Steps between two measurements; the last step is measured too.")
    patience: Annotated[StrictInt, Field(ge=1, le=10_000)] = Field(
        3, description="Measurements in a row without a gain after which the training ends."
    )
    min_delta: Annotated[Number, Field(ge=0, le=1e6)] = Field(
        0.0, description="What a measurement must gain on the best one to count."
    )


class TrainingSettings(_Settings):
    """How the loop runs."""

    steps: Count | None = Field(None, description="Optimiser steps. Give these or epochs.")
    epochs: Annotated[Number, Field(gt=0, le=10_000)] | None = Field(
        None, description="Passes over the training rows; unset with steps unset: 1."
    )
    batch_size: Annotated[StrictInt, Field(ge=1, le=65536)] = Field(
        8, description="Rows of one forward pass; a step takes batch_size × gradient_accumulation rows."
    )
    gradient_accumulation: Annotated[StrictInt, Field(ge=1, le=65536)] = Field(
        1, description="Forward passes of one optimiser step."
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or plain stochastic gradient descent without momentum; a method may bring its own."
    )
    learning_rate: Annotated[Number, Field(gt=0, le=10)] = Field(2e-4, description="Peak of the schedule.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="After the warm-up: stay, or fall to 0 along a line or a cosine."
    )
    warmup_steps: Annotated[StrictInt, Field(ge=0, le=10_000_000)] = Field(
        0, description="Steps in which the learning rate rises from 0."
    )
    weight_decay: Annotated[Number, Field(ge=0, le=1)] = Field(0.0, description="Of the optimiser.")
    max_grad_norm: Annotated[Number, Field(ge=0, le=1e6)] = Field(
        1.0, description="Gradients are scaled down to this norm; 0 leaves them."
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Of the frozen weights and the arithmetic; the adapter is always trained in float32. float16 needs "
        "a GPU.",
    )
    gradient_checkpointing: StrictBool = Field(
        False, description="Compute activations twice instead of keeping them: less memory, about a third slower."
    )
    checkpoint_seconds: Annotated[Number, Field(gt=0, le=SECONDS_PER_DAY)] = Field(
        300.0, description="Longest time between two checkpoints: what an interruption costs at most."
    )
    checkpoint_steps: Count | None = Field(None, description="Also write one every so many steps.")

    early_stopping: EarlyStopping | None = Field(
        None, description="End early when the validation rows gain nothing more; unset, all steps are done."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSettings:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self

    def steps_for(self, rows: int) -> int:
        """Optimiser steps of the whole training on so many rows."""
        if self.steps is not None:
            return self.steps
        batches = -(-rows // self.batch_size)
        per_epoch = max(-(-batches // self.gradient_accumulation), 1)
        return math.ceil((self.epochs or 1.0) * per_epoch)


class EvaluationSettings(_Settings):
    """What is measured before and after the training, on rows that are not trained on."""

    validation_fraction: Share = Field(
        0.1, description="Share of the rows that are held out, chosen by the hash of the row; 0 measures nothing."
    )
    max_rows: Annotated[StrictInt, Field(ge=1, le=100_000)] = Field(
        200, description="Most rows that are measured, the first of the validation rows."
    )
    exact_match: StrictBool = Field(
        False,
        description="Also write greedy answers and count those equal to the completion: slow. causal-lm only.",
    )
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=8192)] = Field(64, description="Longest greedy answer.")
    bootstrap: Annotated[StrictInt, Field(ge=100, le=100_000)] = Field(
        2000, description="Resamples of the paired bootstrap that gives the 95 % intervals."
    )
    group_column: Column | None = Field(
        None,
        description="Column that tells the parts of the data apart, such as the tasks of a mixture, with text or whole "
        "numbers: the figures are told for each part too. Nobody trains on it. Not for text-to-image.",
    )

    @property
    def grouped(self) -> bool:
        """Whether rows of each group are measured."""
        return self.group_column is not None and self.validation_fraction > 0


def parse_task(value: Any) -> TaskSettings:
    """The settings of a task from JSON; its name alone stands for its defaults.

    Raises:
        pydantic.ValidationError: unknown task, unknown setting, or a value out of range.
    """
    return _TASK.validate_python({"type": value} if isinstance(value, str) else value)


_TASK: TypeAdapter[TaskSettings] = TypeAdapter(TaskSettings)
