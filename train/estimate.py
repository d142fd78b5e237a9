"""What a training takes: trainable parameters and bytes, before anything is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from artifacts.errors import FieldError, RequestInvalid
from train.options.common import ADAM_STATE_BYTES, Target, TrainOptions
from train.settings import TaskSettings, TrainingSettings

FLOAT32_BYTES = 4
WEIGHT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
EMBEDDINGS = frozenset({"embed_tokens", "word_embeddings", "wte"})
_KEPT_PER_LAYER = 2.0  # activations that the backward pass needs, in multiples of the layers' inputs and outputs


@dataclass(frozen=True, slots=True)
class Estimate:
    """Numbers of a training. `floor_bytes` is taken for certain; `peak_bytes` is a guess with the activations."""

    trainable_parameters: int
    base_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def floor_bytes(self) -> int:
        """Weights, adapter, its gradients and the optimiser's state."""
        return self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        return self.floor_bytes + self.activation_bytes

    def to_dict(self) -> dict[str, int]:
        return asdict(self) | {"floor_bytes": self.floor_bytes, "peak_bytes": self.peak_bytes}


def estimate(
    options: TrainOptions,
    targets: Sequence[Target],
    linear: Mapping[str, tuple[int, int]],
    training: TrainingSettings,
    task: TaskSettings,
    parameter_count: int | None = None,
    devices: int = 1,
    whole: int = 0,
    packed: Mapping[str, int] | None = None,
) -> Estimate:
    """What the training takes on a base model with these layers, on each of its devices.

    Args:
        linear: path → (d_out, d_in) of all weights of the base model.
        parameter_count: of the base model; unknown, it is counted from `linear`.
        devices: that share the rows of a batch.
        packed: path → bytes of the layers whose weights are packed; `parameter_count` is without them.
        whole: parameters of modules that are trained as they are; what a new head has is known when the rows are read.
    """
    beside = whole + options.parameters_beside(_width(linear))
    of_layers = [options.parameters_of(target.d_out, target.d_in) for target in targets]
    trainable = beside + sum(of_layers)
    graded = max([beside, *of_layers]) if options.frees_gradients else trainable
    kept_of_layers = sum(options.optimizer_bytes_of(target.d_out, target.d_in) for target in targets)
    packed = packed or {}
    parameters = parameter_count or sum(
        d_out * d_in for path, (d_out, d_in) in linear.items() if path not in packed and not _tied(path, linear)
    )
    width = WEIGHT_BYTES[training.precision]
    frozen = max(parameters - trainable, 0) if options.trains_base else parameters
    tokens = training.batch_size * task.positions // devices
    per_token = sum(d_out + d_in for d_out, d_in in linear.values())
    kept = _KEPT_PER_LAYER * tokens * per_token * width
    return Estimate(
        trainable_parameters=trainable,
        base_bytes=frozen * width + sum(packed.values()),
        adapter_bytes=trainable * FLOAT32_BYTES,
        gradient_bytes=graded * FLOAT32_BYTES,
        optimizer_bytes=kept_of_layers + beside * ADAM_STATE_BYTES,
        activation_bytes=int(kept / 4 if training.gradient_checkpointing else kept),
    )


def _width(linear: Mapping[str, tuple[int, int]]) -> int:
    """How long hidden states are: what the layer with the most outputs, which is the vocabulary's, reads."""
    return max(linear.values(), default=(0, 0))[1]


def _tied(path: str, linear: Mapping[str, tuple[int, int]]) -> bool:
    """Whether it may be an output head that shares the weight of the embedding: then it takes nothing."""
    if path.rpartition(".")[2] != "lm_head":
        return False
    return any(other.rpartition(".")[2] in EMBEDDINGS and linear[other] == linear[path] for other in linear)


def check_fits(needed: Estimate, memory_bytes: int, where: str) -> None:
    """Refuse what can not fit even with no activations at all.

    Raises:
        RequestInvalid: at /training, with both numbers.
    """
    if needed.floor_bytes <= memory_bytes:
        return
    problem = (
        f"the weights, the adapter and the optimiser's state alone take {needed.floor_bytes / 1e9:.1f} GB; "
        f"{where} has {memory_bytes / 1e9:.1f} GB"
    )
    raise RequestInvalid(
        f"The training can not fit: {problem}.",
        hint="Take a lower precision, a smaller rank or fewer target modules, or a larger device.",
        errors=[FieldError("/training", problem)],
    )
