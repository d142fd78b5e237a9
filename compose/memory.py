"""What an image takes for certain, before anything is loaded: a lower bound, so that what it refuses could never run.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import ComposeRefused, FieldError
from artifacts.safetensors_header import BASE_DTYPE_BYTES, MAX_BASE_HEADER_BYTES, read_header
from compose.options.common import ComposeOptions
from compose.pipeline_facts import PipelineFacts
from compose.precision import Precision
from compose.request import CompositionRequest

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
BYTES: dict[Precision, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes.

    Attributes:
        weights: of the pipeline.
        samples: rows of the largest batch that goes through the UNet.
        sample: of one row: what the way down keeps for the way up.
    """

    weights: int
    samples: int
    sample: int

    @property
    def floor(self) -> int:
        """Taken for certain."""
        return self.weights + self.samples * self.sample


def estimate(
    folder: Path, facts: PipelineFacts, request: CompositionRequest, options: ComposeOptions, precision: Precision
) -> Estimate:
    """What the request takes on the pipeline in `folder`.

    Raises:
        FileBroken: a file of weights is none.
    """
    size = BYTES[precision]
    height = (request.height or facts.native[0] * facts.vae_factor) // facts.vae_factor
    width = (request.width or facts.native[1] * facts.vae_factor) // facts.vae_factor
    kept = 0
    for level, channels in enumerate(facts.channels):
        cells = max(1, height >> level) * max(1, width >> level)
        # each layer's output, and one more at each level: of the first convolution or of the halving
        kept += (facts.layers + 1) * channels * cells
    return Estimate(_elements(folder) * size, _samples(request, options), kept * size)


def check_fits(found: Estimate, memory: int, where: str) -> None:
    """Refuse what can not fit.

    Raises:
        ComposeRefused: at /parameters/batch_branches if running branches one after another would help, else at /width
            or, where the weights alone are too many, /base_model.
    """
    if found.floor <= memory:
        return
    one_by_one = Estimate(found.weights, min(found.samples, 2), found.sample)
    numbers = f"{found.floor / 1e9:.1f} GB at least, and {where} has {memory / 1e9:.1f} GB"
    if found.weights > memory:
        pointer, problem, hint = "/base_model", f"its weights take {numbers}", "Take a lower precision."
    elif one_by_one.floor <= memory:
        pointer = "/parameters/batch_branches"
        problem = f"{found.samples} samples in one batch take {numbers}"
        hint = "Set batch_branches to never: branches then run one after another."
    else:
        pointer, problem, hint = "/width", f"an image of this size takes {numbers}", "Make it smaller."
    raise ComposeRefused(f"The image does not fit: {problem}.", hint=hint, errors=[FieldError(pointer, problem)])


def _samples(request: CompositionRequest, options: ComposeOptions) -> int:
    """Rows of the largest batch: guidance makes two of one; branches come together where the method does that."""
    halves = 2 if options.guidance_scale > 1 else 1
    # several adapters in one branch can not share a batch with others
    together = getattr(options, "batch_branches", "never") == "auto" and not request.styles
    branches = len(request.concepts) + (1 if getattr(options, "base_branch", False) else 0) if together else 1
    return halves * branches


def _elements(folder: Path) -> int:
    """Numbers in the files of weights; headers alone are read."""
    return sum(
        tensor.elements
        for part in PARTS
        for file in sorted((folder / part).glob("*.safetensors"))
        if ".fp16." not in file.name  # a second copy
        for tensor in read_header(
            file, dtypes=BASE_DTYPE_BYTES, max_header_bytes=MAX_BASE_HEADER_BYTES
        ).tensors.values()
    )
