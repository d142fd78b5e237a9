"""What the configuration files of a pipeline tell of it, before any of it is loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.base_model import PIPELINE_INDEX
from artifacts.errors import ComposeRefused, FieldError
from artifacts.layout import read_json
from compose.map_grid import choose_grid
from compose.options.common import ComposeOptions
from compose.request import CompositionRequest

SUPPORTED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
SECOND_ORDER = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
"""Samplers that call the model twice a step."""
PREDICTIONS = ("epsilon", "v_prediction")
_CROSS = "CrossAttn"
_SD_CHANNELS = (320, 640, 1280, 1280)
_SD_DOWN = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
_SD_UP = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)


@dataclass(frozen=True, slots=True)
class PipelineFacts:
    """A pipeline, as its files describe it.

    Attributes:
        native: latent pixels (height, width) of its own size.
        vae_factor: pixels a side that are one latent pixel.
        grids: factors by which grids with cross-attention are coarser than the latent.
        channels: of each level of the UNet; layers: of each level, at least.
        scheduler, prediction: class of the stored sampler, and what the UNet predicts; None where no file says so.
    """

    name: str
    kind: str
    native: tuple[int, int]
    vae_factor: int
    grids: tuple[int, ...]
    channels: tuple[int, ...]
    layers: int
    scheduler: str | None
    prediction: str | None

    @classmethod
    def read(cls, folder: Path) -> PipelineFacts:
        """Raises ComposeRefused (at /base_model) when it is no pipeline that images are composed with, ConfigRefused
        when a file is no JSON object."""
        kind = pipeline_kind(folder)
        unet, vae = _config(folder / "unet"), _config(folder / "vae")
        _check_unet(folder.name, unet, vae)
        sampler = folder / "scheduler" / "scheduler_config.json"
        schedule: Mapping[str, Any] = read_json(sampler) if sampler.is_file() else {}
        side = unet.get("sample_size") or 64
        return cls(
            name=folder.name,
            kind=kind,
            native=(side, side) if isinstance(side, int) else (int(side[0]), int(side[1])),
            vae_factor=2 ** (len(vae.get("block_out_channels") or (1,) * 4) - 1),
            grids=_grids(unet),
            channels=tuple(unet.get("block_out_channels") or _SD_CHANNELS),
            layers=_layers(unet),
            scheduler=schedule.get("_class_name"),
            prediction=schedule.get("prediction_type"),
        )

    def check(self, request: CompositionRequest, options: ComposeOptions) -> None:
        """Refuse what this pipeline can not make.

        Raises:
            ComposeRefused: a side that does not divide, a grid or a sampler that will not do; with a pointer.
        """
        grid = 1
        if "map_grid" in type(options).model_fields:
            grid = choose_grid(self.grids, max(self.native), getattr(options, "map_grid", None))
        multiple = self.vae_factor * grid
        for name, given, own in (("height", request.height, self.native[0]), ("width", request.width, self.native[1])):
            check_side(name, own * self.vae_factor if given is None else given, multiple)
        problem = self._sampler_problem(options)
        if problem is not None:
            raise ComposeRefused(
                f"T{problem[1:]}.",
                hint="Take the scheduler 'ddim' or 'euler', with a base model that predicts noise or velocity.",
                errors=[FieldError("/parameters/scheduler", problem)],
            )

    def _sampler_problem(self, options: ComposeOptions) -> str | None:
        if self.scheduler is not None and "FlowMatch" in self.scheduler:
            return f"the base model's sampler {self.scheduler} is one of flow matching"
        if self.prediction is not None and self.prediction not in PREDICTIONS:
            return f"the base model predicts {self.prediction!r}; supported are {' and '.join(PREDICTIONS)}"
        if options.scheduler == "pipeline" and self.scheduler in SECOND_ORDER:
            return f"the base model's sampler {self.scheduler} calls the model twice a step"
        return None


def pipeline_kind(folder: Path) -> str:
    """The class of the pipeline in a folder. Raises ComposeRefused when it is none that is supported."""
    index = folder / PIPELINE_INDEX
    kind = read_json(index).get("_class_name") if index.is_file() else None
    if kind not in SUPPORTED:
        found = f"is a {kind}" if kind else "is no folder of a diffusers pipeline"
        raise base_refused(
            f"The base model {folder.name!r} {found}; images are composed with {' or '.join(SUPPORTED)}."
        )
    return str(kind)


def check_side(name: str, side: int, multiple: int) -> int:
    """The side, in pixels. Raises ComposeRefused (at /height or /width) when it is no multiple of `multiple`."""
    if side % multiple:
        near = max(multiple, round(side / multiple) * multiple)
        message = f"{side} is no multiple of {multiple}, as this model needs it; {near} is"
        raise ComposeRefused(f"The {name} {message}.", errors=[FieldError(f"/{name}", message)])
    return side


def base_refused(detail: str) -> ComposeRefused:
    """What is wrong with the base model."""
    return ComposeRefused(
        detail,
        hint="Give the folder that save_pretrained of such a pipeline wrote, with safetensors weights.",
        errors=[FieldError("/base_model", detail)],
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise base_refused(f"The base model {folder.parent.name!r} has no {folder.name}/config.json.")
    return dict(read_json(file))


def _check_unet(name: str, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse kinds of UNet that take more than a latent, a time and words."""
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    problem = None
    if channels != latent:
        problem = f"takes {channels} channels, more than a latent: an inpainting model?"
    elif unet.get("time_cond_proj_dim") is not None:
        problem = "was distilled to take its guidance as an input (a consistency model)."
    elif unet.get("class_embed_type") or unet.get("encoder_hid_dim_type"):
        problem = "takes more than text and a time."
    if problem is not None:
        raise base_refused(f"The UNet of {name!r} {problem}")


def _layers(unet: Mapping[str, Any]) -> int:
    found = unet.get("layers_per_block", 2)
    return int(found) if isinstance(found, int) else min(found)


def _grids(unet: Mapping[str, Any]) -> tuple[int, ...]:
    """Each level of the UNet has half the side of the one before; which have cross-attention, their types tell."""
    levels = len(unet.get("block_out_channels") or _SD_CHANNELS)
    down, up = unet.get("down_block_types") or _SD_DOWN, unet.get("up_block_types") or _SD_UP
    found = {2**level for level, kind in enumerate(down) if _CROSS in kind}
    found |= {2 ** (levels - 1 - place) for place, kind in enumerate(up) if _CROSS in kind}
    if _CROSS in str(unet.get("mid_block_type", "UNetMidBlock2DCrossAttn")):
        found.add(2 ** (levels - 1))
    return tuple(sorted(found))
