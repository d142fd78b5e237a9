"""The parts of a StableDiffusionPipeline's folder: read one by one, with no pickle and no code of a repository."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from artifacts.errors import RequestInvalid
from train.base_files import BaseFiles
from train.feasibility import PIPELINE, check_pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

_LONGEST_CAPTION = 77  # tokens, where neither tokenizer nor text encoder says


@dataclass(frozen=True, slots=True)
class PipelineFiles:
    """Where the parts are."""

    base: BaseFiles

    def check(self) -> None:
        """Raises RequestInvalid when the folder holds another pipeline, or none."""
        from diffusers import DiffusionPipeline

        config = self._read(lambda: DiffusionPipeline.load_config(self.base.location, revision=self._revision))
        found = config.get("_class_name") if isinstance(config, dict) else None
        check_pipeline(self.base.name, str(found))

    def unet(self, dtype: str, device: str) -> nn.Module:
        """The UNet, frozen, for evaluation. Raises RequestInvalid."""
        from diffusers import UNet2DConditionModel

        model: Any = self._part(UNet2DConditionModel, "unet", torch_dtype=getattr(torch, dtype), use_safetensors=True)
        model.name_or_path = self.base.name  # PEFT writes it into the adapter's configuration
        still: nn.Module = _still(model, device)
        return still

    def vae(self, device: str) -> Any:
        """In float32: half precision is not enough for many of them. Raises RequestInvalid."""
        from diffusers import AutoencoderKL

        return _still(self._part(AutoencoderKL, "vae", torch_dtype=torch.float32, use_safetensors=True), device)

    def text_encoder(self, device: str) -> Any:
        """Raises RequestInvalid."""
        from transformers import CLIPTextModel

        model = self._part(CLIPTextModel, "text_encoder", dtype=torch.float32, use_safetensors=True)
        return _still(model, device)

    def tokenizer(self) -> Any:
        """Raises RequestInvalid."""
        from transformers import CLIPTokenizer

        return self._part(CLIPTokenizer, "tokenizer")

    def scheduler_config(self) -> dict[str, Any]:
        """Raises RequestInvalid."""
        from diffusers import DDPMScheduler

        config = self._read(
            lambda: DDPMScheduler.load_config(self.base.location, subfolder="scheduler", revision=self._revision)
        )
        return dict(config)

    @property
    def _revision(self) -> str:
        return self.base.revision or "main"

    def _part(self, kind: Any, folder: str, **options: Any) -> Any:
        return self._read(
            lambda: kind.from_pretrained(self.base.location, subfolder=folder, revision=self._revision, **options)
        )

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestInvalid(
                f"The base model {self.base.name!r} can not be loaded: {error}",
                hint=f"Its folder needs what save_pretrained of a {PIPELINE} writes, with safetensors weights.",
            ) from error


def _still(model: Any, device: str) -> Any:
    return model.requires_grad_(False).to(device).eval()


def pixels_of(image: Image, resolution: int) -> Tensor:
    """The middle of an image as a square: (3, resolution, resolution), −1 to 1."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    square = ImageOps.fit(image, (resolution, resolution), Resampling.LANCZOS)
    values = torch.from_numpy(np.asarray(square, dtype=np.float32).copy())
    return values.permute(2, 0, 1) / 127.5 - 1


def longest_caption(tokenizer: Any, text_encoder: Any) -> int:
    """Tokens."""
    sizes = [int(tokenizer.model_max_length), int(getattr(text_encoder.config, "max_position_embeddings", 10**9))]
    return min(size for size in [*sizes, _LONGEST_CAPTION] if size > 0)
