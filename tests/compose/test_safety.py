"""The safety checker: what is flagged is refused, what CLIP is given, and a checker that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from artifacts.errors import ImageFlagged, RequestInvalid
from compose.safety import SafetyChecker, loaded_checker

SIDE = 16


def write_checker(folder: Path, threshold: float) -> Path:
    """A random checker that flags whatever is more like its concepts than `threshold` (a cosine)."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": SIDE, "patch_size": 8}, projection_dim=8)
    model = StableDiffusionSafetyChecker(config)
    model.concept_embeds_weights.data.fill_(threshold)
    model.special_care_embeds_weights.data.fill_(2.0)
    model.save_pretrained(folder)
    return folder


def picture(width: int = 40, height: int = 24) -> Image.Image:
    values = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values, "RGB")


def test_what_is_flagged_is_refused_and_the_rest_is_not(tmp_path: Path) -> None:
    strict = SafetyChecker.load(write_checker(tmp_path / "strict", -2.0))
    with pytest.raises(ImageFlagged, match="flagged the image"):
        strict.check(picture())
    SafetyChecker.load(write_checker(tmp_path / "mild", 2.0)).check(picture())


def test_the_checker_sees_the_middle_square_as_clip_does(tmp_path: Path) -> None:
    """Against transformers' own processor of CLIP."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    checker = SafetyChecker.load(write_checker(tmp_path / "checker", 2.0))
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    for size in ((40, 24), (24, 40), (16, 16), (8, 12)):
        image = picture(*size)
        expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))[None]
        torch.testing.assert_close(checker._pixels(image), expected, atol=0.02, rtol=0)


def test_a_checker_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="can not be loaded") as refused:
        loaded_checker(tmp_path)
    assert "no image is given out" in (refused.value.hint or "")
