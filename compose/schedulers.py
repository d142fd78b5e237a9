"""Samplers: which are taken, and what an update of the latent means in each."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from artifacts.errors import ComposeRefused, FieldError

POINTER = "/parameters/scheduler"
_PREDICTIONS = ("epsilon", "v_prediction")
_WITH_HISTORY = (
    "PNDM",
    "LMS",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "UniPC",
    "DEIS",
    "IPNDM",
    "SASolver",
    "EDMDPMSolver",
)
"""Samplers that go on from the predictions of earlier steps, by the start of their names."""


@dataclass(slots=True)
class Schedule:
    """A sampler of a request's own, so that the pipeline's is never touched.

    Attributes:
        timesteps: as the UNet takes them; PNDM has one more than the steps that were asked for.
    """

    scheduler: Any
    timesteps: Tensor
    generator: torch.Generator
    _extra: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        takes = inspect.signature(self.scheduler.step).parameters
        self._extra = {"generator": self.generator} if "generator" in takes else {}

    @property
    def name(self) -> str:
        return str(type(self.scheduler).__name__)

    @property
    def initial_sigma(self) -> float:
        """What standard normal noise is multiplied with."""
        return float(self.scheduler.init_noise_sigma)

    def scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """What the UNet sees of a latent."""
        found: Tensor = self.scheduler.scale_model_input(latents, timestep)
        return found

    def update_factor(self, timestep: Tensor) -> float:
        """c² with c = latent / what the UNet sees: a step η on the UNet's side moves the latent by η·c²·∂L/∂z.

        1 for DDIM and its kin; σ² + 1 for Euler, whose latents grow with the noise.
        """
        one = torch.ones(1, dtype=torch.float64, device=timestep.device)
        return float(1.0 / self.scaled(one, timestep).item() ** 2)

    def step(self, noise: Tensor, timestep: Tensor, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step: the next latent, and the clean one that is foreseen where the sampler tells it."""
        result = self.scheduler.step(noise, timestep, latents, **self._extra)
        return result.prev_sample.to(latents.dtype), getattr(result, "pred_original_sample", None)


def make_schedule(
    stored: Any,
    kind: Literal["ddim", "euler", "pipeline"],
    steps: int,
    device: torch.device,
    generator: torch.Generator,
) -> Schedule:
    """A sampler from the noise schedule of the one that is stored with the pipeline.

    Raises:
        ComposeRefused: of second order, flow matching, for a UNet that predicts something else than ε or v, or more
            steps than there are.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    classes = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "pipeline": type(stored)}
    config = dict(stored.config)
    name = classes[kind].__name__
    if "FlowMatch" in type(stored).__name__:
        raise _refused(f"The base model's sampler {type(stored).__name__} is one of flow matching.")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise _refused(f"The base model predicts {prediction!r}; supported are {' and '.join(_PREDICTIONS)}.")
    with _numpy_quiet():
        scheduler = classes[kind].from_config(config)
    if getattr(scheduler, "order", 1) > 1:
        raise _refused(f"{name} calls the model {scheduler.order} times a step.")
    with _numpy_quiet():
        scheduler.set_timesteps(steps, device=device)
    trained = int(config.get("num_train_timesteps", 1000))
    if float(scheduler.timesteps.max()) >= trained:
        detail = f"{steps} steps of {name} go beyond the {trained} that the base model knows"
        raise ComposeRefused(f"{detail}.", hint="Take fewer steps.", errors=[FieldError("/steps", detail)])
    return Schedule(scheduler, scheduler.timesteps, generator)


def history_warning(schedule: Schedule) -> str | None:
    """A sentence when predictions of earlier steps, made before the latent was moved, go into a step."""
    if not schedule.name.startswith(_WITH_HISTORY):
        return None
    return (
        f"{schedule.name} goes on from predictions of earlier steps, which belong to latents that were moved since; "
        "take the scheduler 'ddim' or 'euler'."
    )


def _refused(detail: str) -> ComposeRefused:
    return ComposeRefused(
        detail,
        hint="Take the scheduler 'ddim' or 'euler', with a base model that predicts noise or velocity.",
        errors=[FieldError(POINTER, detail)],
    )


@contextmanager
def _numpy_quiet() -> Iterator[None]:
    """NumPy has a word with diffusers about its way of making σ, which nobody else can change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy", DeprecationWarning)
        yield
