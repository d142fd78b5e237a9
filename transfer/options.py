"""The menu of transfer methods: every parameter with its default, range and source. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, model_validator

from artifacts.menu import NO_NUL, Number
from artifacts.pointers import pointers_below
from train.catalog import METHODS as TRAINING
from train.catalog import parse_parameters
from train.options.common import TrainOptions
from train.settings import TrainingSettings

MAX_ROWS = 100_000
MAX_CANDIDATES = 20 * MAX_ROWS

Rows = Annotated[StrictInt, Field(ge=16, le=MAX_ROWS)]
Share = Annotated[Number, Field(gt=0, le=1)]
Tokens = Annotated[StrictInt, Field(ge=1, le=8192)]
BatchSize = Annotated[StrictInt, Field(ge=1, le=4096)]


class TransferOptions(BaseModel):
    """What every transfer method understands."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    def decisive(self) -> dict[str, Any]:
        """With every default filled in, as JSON, and without what decides no byte of the new adapter."""
        return self.model_dump(mode="json")


class WeightOptions(TransferOptions):
    """Options of the methods that compute the new factors from the old ones, without training."""

    partial: StrictBool = Field(
        False,
        description="Write the adapter also if some of its modules can not be moved; they are listed and left out. "
        "False refuses.",
    )

    @property
    def subspace_rank(self) -> int | None:
        """How many singular vectors of the base weights the method looks at; None: it looks at none."""
        return None


class CopyOptions(WeightOptions):
    """The factors as they are. For a target that is a light continuation of the source; between models that were
    trained independently it can be worse than no adapter at all (arXiv:2608.20918)."""


class SubspaceOptions(WeightOptions):
    """Options of the methods that compare the two bases' weights by their singular vectors."""

    partial: StrictBool = Field(
        True,
        description="Write the adapter also if some of its modules can not be moved, because the target has no such "
        "layer or they are too unlike; they are listed and left out. False refuses.",
    )
    basis_rank: Annotated[StrictInt, Field(ge=1, le=16384)] = Field(
        320, description="Leading singular vectors of every weight, capped at its smaller side."
    )

    @property
    def subspace_rank(self) -> int | None:
        return self.basis_rank


class CrossLoraOptions(SubspaceOptions):
    """Cross-LoRA, arXiv:2508.05232, in the form that serves bases of different widths: the core of ΔW in the source's
    singular vectors is put into the target's. Their signs are fixed, and mean nothing."""


class LoraXOptions(SubspaceOptions):
    """LoRA-X, arXiv:2501.16559: ΔW projected onto the target's leading singular vectors."""

    minimum_similarity: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.0,
        description="Φ, the likeness of the two weights' column spaces, below which a module is left out. Where the "
        "widths differ it is not defined and not asked for.",
    )


class ProloraOptions(SubspaceOptions):
    """ProLoRA, arXiv:2506.04244: the parts of ΔW inside and outside of the source's spaces, each put into the same of
    the target's; the rank doubles. For bases of the same widths."""

    minimum_similarity: Annotated[Number, Field(ge=0, le=1)] = Field(
        0.8, description="Φ, the likeness of the two weights' column spaces, below which a module is left out (paper)."
    )


class DistilOptions(TransferOptions):
    """Options of the methods that train a new adapter on the answers of the old one."""

    target_method: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=NO_NUL)] = Field(
        "lora", description="Kind of the new adapter: any method of POST /train, such as lora or dora."
    )
    target_parameters: dict[str, Any] = Field(
        {},
        description="Parameters of that method. Layers that are not named are those of queries and values, under the "
        "names that the target base has for them (as in the paper).",
    )
    training: TrainingSettings = Field(
        TrainingSettings(epochs=20, learning_rate=2e-4, batch_size=8),
        description="The new adapter's training, as in POST /train. The paper searched learning rates from 2e-5 to "
        "2e-4; models of a few hundred million parameters need 1e-3 to 3e-3.",
    )
    max_length: Annotated[StrictInt, Field(ge=16, le=1_048_576)] = Field(
        1024, description="Longest row of the training, tokens of the target; longer ones are left out."
    )
    answer_tokens: Tokens = Field(
        256, description="Longest answer of the source adapter, tokens; one that has not ended by then is left out."
    )
    answer_stop: Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=NO_NUL)] | None = Field(
        None, description="Text that ends an answer besides the model's own end, such as a line end."
    )
    answer_batch: BatchSize = Field(32, description="Answers that are written together; decides nothing but rounding.")

    @model_validator(mode="after")
    def _trainable(self) -> DistilOptions:
        self.train_options(())
        if self.training.early_stopping is not None:
            raise ValueError("training.early_stopping: a transfer holds no rows out of its training to stop by")
        return self

    def decisive(self) -> dict[str, Any]:
        found = super().decisive()
        for name in ("checkpoint_seconds", "checkpoint_steps"):
            del found["training"][name]
        found["target_parameters"] = self.train_options(()).model_dump(mode="json")
        if "target_modules" not in self.target_parameters:
            found["target_parameters"]["target_modules"] = None
        return found

    def train_options(self, default_targets: tuple[str, ...]) -> TrainOptions:
        """The options of the target's method; `default_targets` are its layers if it adapts any and none are named."""
        parameters: Mapping[str, Any] = self.target_parameters
        row = TRAINING.get(self.target_method)
        adapts = row is not None and row.options.adapts_layers
        if adapts and default_targets and "target_modules" not in parameters:
            parameters = {**parameters, "target_modules": list(default_targets)}
        with (
            pointers_below("/parameters/target_method", "/method"),
            pointers_below("/parameters/target_parameters", "/parameters"),
        ):
            return parse_parameters(self.target_method, parameters)


class SeedsOnlyOptions(DistilOptions):
    """The seeds alone, answered by the source adapter: the control that every distillation has to beat."""


class RefreshOptions(DistilOptions):
    """Refresh, arXiv:2608.20918: inputs that were kept, answered by the source adapter. The same training as
    trans-lora's, with real inputs in place of synthetic ones."""


class LorasuiteOptions(DistilOptions):
    """LoRASuite, arXiv:2505.13515: a start computed from both bases' weights (words in common, layers paired by their
    likeness, heads by that of their weights), and a short training on answers of the source adapter to inputs that were
    kept, or else to the seeds. The paper trains on 100 samples of the task itself."""

    training: TrainingSettings = Field(
        TrainingSettings(epochs=3, learning_rate=1e-4, batch_size=8),
        description="The training after the start, as in POST /train (paper: 3 epochs, 1e-4, no warm-up).",
    )
    samples: Annotated[StrictInt, Field(ge=3, le=MAX_ROWS)] = Field(
        100, description="Most inputs that are used: to pair the layers, and to train on."
    )
    keep_scale: StrictBool = Field(
        True,
        description="Make ΔW as large beside the target's weight as it was beside the source's. The published formulas "
        "(false) lose the scale.",
    )


class TransLoraOptions(DistilOptions):
    """Trans-LoRA, arXiv:2405.17258: the target base invents inputs after a few seeds, a filter keeps those that look
    like the task, the source adapter answers them, and a new adapter learns the answers. No training data is read."""

    rows: Rows = Field(250, description="N, synthetic inputs that are kept; more help at the same number of steps.")
    max_candidates: Annotated[StrictInt, Field(ge=16, le=MAX_CANDIDATES)] | None = Field(
        None, description="Most inputs that are generated; unset, 20 times `rows`."
    )
    filter: Literal["discriminator", "excess", "tuneshift_kd", "none"] = Field(
        "discriminator",
        description="discriminator: the paper's, needs an adapter that was trained with transferable. excess: keep "
        "the inputs whose answers gain most by the adapter, and learn only the tokens that do (TiTok, "
        "arXiv:2510.04682). tuneshift_kd: keep answers that surprise the source base but not the adapter "
        "(arXiv:2603.24518). none: keep all that are well-formed.",
    )
    threshold: Annotated[Number, Field(ge=-1e6, le=1e6)] | None = Field(
        None,
        description="A score has to be above it: logit of yes minus logit of no for discriminator (unset: 0), the "
        "comparison of perplexities for tuneshift_kd (unset: 1.5).",
    )
    on_starved: Literal["fail", "top_n"] = Field(
        "fail",
        description="What happens if max_candidates give too few accepted inputs: fail, or take the best of all and "
        "mark the adapter as degraded.",
    )
    pool: Annotated[Number, Field(ge=1, le=20)] = Field(
        2.0, description="Filter excess: inputs that are answered and ranked, as a multiple of `rows`."
    )
    token_share: Share = Field(
        0.7, description="Filter excess: share of the tokens of a batch that are learnt, those with the highest scores."
    )
    comparison: Literal["ratio", "difference"] = Field(
        "ratio", description="Filter tuneshift_kd: perplexity of the base over, or minus, that of base and adapter."
    )
    grow_seeds: StrictBool | None = Field(
        None,
        description="Inputs that the filter has accepted become seeds of the next batches, a few drawn anew for each. "
        "For the filters discriminator and tuneshift_kd; unset: true for tuneshift_kd (arXiv:2603.24518), else false.",
    )
    temperature: Annotated[Number, Field(gt=0, le=10)] = Field(
        1.0, description="Of the generator; low ones repeat themselves and the seeds."
    )
    top_p: Share = Field(1.0, description="Draw from the fewest tokens whose probabilities reach this sum.")
    top_k: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = Field(
        None, description="Draw from so many of the most likely tokens."
    )
    input_tokens: Tokens = Field(
        128, description="Longest generated input, tokens; one that has not ended by then is left out."
    )
    stop: Literal["auto", "line", "item"] = Field(
        "auto", description="A generated input ends with its line, or before the next number; auto: as the seeds do."
    )
    generation_batch: BatchSize = Field(
        32, description="Inputs that are generated together, and kept together if the transfer is interrupted."
    )
    filter_batch: BatchSize = Field(32, description="Inputs that a filter looks at together.")
    held_out: Annotated[StrictInt, Field(ge=0, le=10_000)] = Field(
        0,
        description="Synthetic rows that are not trained on but measured, when the owner gives no holdout: how often "
        "the new adapter says what the old one does (fidelity only).",
    )

    @model_validator(mode="after")
    def _enough_candidates(self) -> TransLoraOptions:
        if self.rows > self.candidates:
            raise ValueError(f"max_candidates: {self.candidates} can not give {self.rows} rows")
        if self.filter == "excess" and self.ranked > self.candidates:
            raise ValueError(f"max_candidates: {self.candidates} are fewer than pool asks for ({self.ranked})")
        if self.grow_seeds and self.filter in ("excess", "none"):
            raise ValueError(f"grow_seeds: the filter {self.filter} accepts no input before all are generated")
        if self.held_out >= self.rows:
            raise ValueError("held_out: no row is left to train on")
        return self

    @property
    def candidates(self) -> int:
        """The most that are generated."""
        return 20 * self.rows if self.max_candidates is None else self.max_candidates

    @property
    def growing(self) -> bool:
        """Whether accepted inputs become seeds."""
        return self.filter == "tuneshift_kd" if self.grow_seeds is None else self.grow_seeds

    @property
    def ranked(self) -> int:
        """Inputs that the filter excess ranks."""
        return int(-(-self.rows * self.pool // 1))

    @property
    def cut(self) -> float:
        """The threshold in force."""
        if self.threshold is not None:
            return self.threshold
        return 1.5 if self.filter == "tuneshift_kd" else 0.0
