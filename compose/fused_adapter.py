"""Several adapters become one: methods of the menu that yield an adapter. From a request to a PEFT directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from artifacts.errors import ComposeRefused, FieldError
from artifacts.export import ExportedModule, PeftWriter, lora_config
from artifacts.manifest import LoraModule
from compose.adapter_switch import tuner_layers
from compose.catalog import find_method
from compose.engine import OnStep, make_scene
from compose.pipelines import LoadedPipeline, PipelineCache
from compose.request import CompositionRequest
from compose.scene import Scene
from compose.validation import Validated, validate

if TYPE_CHECKING:
    from compose.options.fusion import FusionOptions

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By layer A, (r, d_in) or (r, c_in, kh, kw), and B, (d_out, r) or (d_out, r, 1, 1), with ΔW = B·A."""


@dataclass(frozen=True, slots=True)
class FusedAdapter:
    """What came out.

    Attributes:
        directory: in PEFT's form, for the UNet of the base model; scaling 1.
        report: JSON.
    """

    directory: Path
    rank: int
    report: Mapping[str, Any]


class FusionMethod:
    """A way to make one adapter of several. Made for one request; runs without gradients unless it turns them on. The
    pipeline is put back by `fuse`."""

    def __init__(self, scene: Scene, stack: ExitStack) -> None:
        self.scene = scene
        self.stack = stack

    @staticmethod
    def size_multiple(options: Any, unet: Any) -> int:
        """Latent pixels that both sides must be a multiple of."""
        del options, unet
        return 1

    def total(self) -> int:
        """Steps that `fused` reports."""
        raise TypeError(f"{type(self).__name__} fuses nothing")

    def fused(self, advance: Callable[[], None]) -> Factors:
        """The new adapter's factors. `advance` is called after every step; it may raise to stop."""
        raise TypeError(f"{type(self).__name__} fuses nothing")

    def report(self) -> dict[str, Any]:
        """JSON, for the adapter's report."""
        return {}


def fuse(
    request: CompositionRequest, pipelines: PipelineCache, directory: Path, on_step: OnStep | None = None
) -> FusedAdapter:
    """Make the adapter of a request whose method yields one, and write it into `directory`.

    Args:
        on_step: called after every step; may raise to stop, after which the pipeline is as it was, and nothing written.

    Raises:
        ComposeRefused and its kin: as `compose`. CompositionDiverged: NaN. DiskFull.
    """
    validated = validate(request, yields="adapter")
    return fuse_with(pipelines.get(request.base), request, validated, directory, on_step)


def fuse_with(
    loaded: LoadedPipeline,
    request: CompositionRequest,
    validated: Validated,
    directory: Path,
    on_step: OnStep | None = None,
) -> FusedAdapter:
    """As `fuse`, with a pipeline that is at hand."""
    started = time.perf_counter()
    with loaded.lock, torch.no_grad(), loaded.restored(), ExitStack() as stack:
        scene = make_scene(loaded, request, validated)
        _check_text_encoders(scene)
        kind: Any = find_method(request.method).load()
        method: FusionMethod = kind(scene, stack)
        factors = method.fused(_progress(method.total(), on_step))
        rank = write_adapter(directory, factors, request, scene.loaded.dtype)
        report = {
            "method": request.method,
            "parameters": validated.options.model_dump(mode="json"),
            "prompt": request.prompt,
            "concepts": [
                {"adapter": item.name, "trigger": item.trigger, "noun": item.noun, "weight": item.weight}
                for item in request.concepts
            ],
            "styles": [{"adapter": item.name, "weight": item.weight} for item in request.styles],
            "seed": request.seed,
            "rank": rank,
            "layers": len(factors),
            "passes": {"unet_samples": scene.passes.full, "backward": scene.passes.backward},
            "seconds": {"total": time.perf_counter() - started, "unet": scene.passes.seconds},
            **method.report(),
            "warnings": list(dict.fromkeys(scene.warnings)),
        }
    return FusedAdapter(directory, rank, report)


def _progress(total: int, on_step: OnStep | None) -> Callable[[], None]:
    from compose.composition import StepReport

    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(StepReport(done, total, lambda: None))

    return advance


def _check_text_encoders(scene: Scene) -> None:
    options: FusionOptions = scene.options  # type: ignore[assignment]
    given = [
        *((name, f"/concepts/{index}/adapter") for index, name in enumerate(scene.concepts)),
        *((name, f"/styles/{index}/adapter") for index, name in enumerate(scene.styles)),
    ]
    layers = [layer for model in scene.loaded.text_encoders for layer in tuner_layers(model)]
    for name, pointer in given:
        if not any(name in layer.scaling for layer in layers):
            continue
        if options.text_encoder == "drop":
            scene.warnings.append(f"What {pointer} has for the text encoder is left out.")
            continue
        raise ComposeRefused(
            f"The adapter at {pointer} has a part for the text encoder, which the fused one could not hold.",
            hint="Set text_encoder to drop to leave it out.",
            errors=[FieldError(pointer, "has a part for the text encoder")],
        )


def write_adapter(directory: Path, factors: Factors, request: CompositionRequest, dtype: torch.dtype) -> int:
    """Write the factors as a PEFT directory of one rank, the largest; others are filled up with zeros.

    Returns:
        The rank.
    """
    rank = max(len(A) for A, _ in factors.values())
    modules = [_module(path, A, B, rank) for path, (A, B) in sorted(factors.items())]
    stored = "F16" if dtype == torch.float16 else "BF16" if dtype == torch.bfloat16 else "F32"
    config = lora_config(rank=rank, target_modules=factors, base_model=request.base.name)
    with PeftWriter(directory, modules, config, dtype=stored) as writer:
        for path, (A, B) in sorted(factors.items()):
            missing = rank - len(A)
            wide_A = functional.pad(A.flatten(1), (0, 0, 0, missing))
            wide_B = functional.pad(B.flatten(1), (0, missing))
            writer.write(path, wide_A.to("cpu", dtype).contiguous(), wide_B.to("cpu", dtype).contiguous())
    return rank


def _module(path: str, A: Tensor, B: Tensor, rank: int) -> ExportedModule:
    down, up = (rank, *A.shape[1:]), (B.shape[0], rank, *B.shape[2:])
    like = LoraModule(
        path=path,
        kind="conv" if A.ndim == 4 else "linear",
        a_key="",
        b_key="",
        rank=rank,
        alpha=float(rank),
        scaling=1.0,
        d_in=A[0].numel(),
        d_out=B.shape[0],
        a_shape=down,
        b_shape=up,
        dtype="F32",
    )
    return ExportedModule(like, rank)
