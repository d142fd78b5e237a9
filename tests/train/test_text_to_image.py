"""The UNet of a tiny pipeline learns noise; what is written is loaded by stock diffusers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifacts.base_model import inspect_base
from artifacts.errors import FormatUnknown, RequestInvalid
from artifacts.intake import inspect
from train.base_files import BaseFiles
from train.catalog import METHODS
from train.continuation import Start
from train.data import DataFile
from train.tasks.denoising import Noising, draws, noising_of
from train.tasks.text_to_image import DIFFUSERS_WEIGHTS, ImageScores

TASK = {"type": "text-to-image", "resolution": 32}
SIZES: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 4, "target_rank": 2},
    "eva": {"rank": 2},
    "smora": {"rank": 4, "active_rank": 2},
    "flexora": {"rank": 4, "validation_rows": 6, "validation_batches": 2},
    "increlora": {"target_rank": 4, "increment": 3, "layers_per_round": 8, "wait": 0},
    "vera": {"rank": 16},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_pipeline import write_tiny_pipeline

    return write_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def imaging(pipeline: Path, tiny_base: Path, tmp_path: Path) -> Any:
    """Makes small trainings on images (`trainings.Trainings`)."""
    from tiny_pipeline import write_images
    from trainings import Trainings

    made = Trainings(tmp_path, tiny_base)
    made.base_files = BaseFiles("tiny-pipeline", str(pipeline))
    made.data = DataFile(write_images(tmp_path / "images.zip"), "images")
    return made


def learn(imaging: Any, method: str = "lora", task: dict[str, Any] | None = None, **more: Any) -> Any:
    settings = {"steps": 8, "batch_size": 4, "gradient_accumulation": 1, "evaluation": {"validation_fraction": 0.3}}
    parameters = SIZES.get(method, {"rank": 4})
    return imaging.run(method, parameters, task=TASK | (task or {}), **(settings | more))


def test_it_learns_resumes_to_the_same_bytes_and_writes_what_diffusers_reads(imaging: Any) -> None:
    options = {"noise_offset": 0.05, "min_snr_gamma": 5.0, "prompt_dropout": 0.2}
    report, adapter, watcher = learn(imaging, task=options, checkpoint_steps=5)
    assert report.evaluation["difference"]["loss"]["high"] < 0
    assert report.reload["largest_difference"] <= 1e-5 < report.reload["effect"]
    assert (report.tokens_per_second, report.target_modules) == (None, 32)
    assert report.data["training_rows"] + report.data["validation_rows"] == 12
    again, resumed, _ = learn(imaging, task=options, resume=watcher.checkpoints[5])
    assert (again.resumed_at, again.evaluation) == (5, report.evaluation)
    assert [path.name for path in adapter.iterdir()] == [DIFFUSERS_WEIGHTS]
    assert (resumed / DIFFUSERS_WEIGHTS).read_bytes() == (adapter / DIFFUSERS_WEIGHTS).read_bytes()
    manifest = inspect(adapter)
    assert (manifest.method, manifest.mergeable, manifest.base_model) == ("lora", True, "tiny-pipeline")
    assert all(module.path.startswith("unet.") for module in manifest.modules)
    assert manifest.report.warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "allora"])
def test_a_training_goes_on_from_an_adapter_in_the_form_of_diffusers(imaging: Any, method: str) -> None:
    first, adapter, _ = learn(imaging)
    start = Start("source", inspect(adapter), adapter)
    more = {"steps": 1, "start": start, "learning_rate": 1e-8, "evaluation": {"validation_fraction": 0.3}}
    report, _, _ = imaging.run(method, {}, task=TASK, batch_size=4, **more)
    assert report.evaluation["before"]["loss"] == pytest.approx(first.evaluation["after"]["loss"], rel=1e-5)
    assert report.evaluation["after"]["loss"] == pytest.approx(first.evaluation["after"]["loss"], rel=1e-4)


def test_gradient_checkpointing_and_the_kind_of_prediction(imaging: Any, tmp_path: Path) -> None:
    plain = learn(imaging, steps=2)[2].points
    kept = learn(imaging, steps=2, gradient_checkpointing=True)[2].points
    assert kept[2]["loss"] == pytest.approx(plain[2]["loss"], rel=1e-4)
    other, _, watcher = learn(imaging, steps=2, task={"prediction": "v-prediction"})
    assert other.data["prediction"] == "v-prediction"
    assert watcher.points[1]["loss"] != plain[1]["loss"]


STOCK = """
import json, sys
import torch
from diffusers import StableDiffusionPipeline

base, adapter = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipeline.set_progress_bar_config(disable=True)

def picture():
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a red square", num_inference_steps=3, height=32, width=32, generator=generator,
                                     output_type="np").images[0])

torch.manual_seed(1)
inputs = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 16, 16)
with torch.no_grad():
    plain, before = pipeline.unet(*inputs).sample, picture()
    pipeline.load_lora_weights(adapter)
    trained, after = pipeline.unet(*inputs).sample, picture()
print(json.dumps({"effect": float((plain - trained).abs().max()), "picture": float((before - after).abs().max())}))
"""


@pytest.mark.slow
def test_a_pipeline_of_stock_diffusers_loads_it_by_its_folder(imaging: Any, pipeline: Path) -> None:
    _, adapter, _ = learn(imaging)
    command = [sys.executable, "-W", "ignore", "-c", STOCK, str(pipeline), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["effect"] > 1e-3
    assert found["picture"] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if TASK["type"] in row.capabilities.tasks])
def test_every_method_trains_a_unet_and_resumes(imaging: Any, method: str) -> None:
    report, adapter, watcher = learn(imaging, method, checkpoint_steps=5)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    assert report.reload["largest_difference"] <= 1e-4 < report.reload["effect"]
    _, resumed, _ = learn(imaging, method, resume=watcher.checkpoints[5])
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (adapter, resumed))
    assert first == second
    assert (DIFFUSERS_WEIGHTS in first) is (METHODS[method].capabilities.exports in ("lora", "dora"))
    inspect(adapter)


def test_what_does_not_fit_is_refused(imaging: Any, tiny_base: Path, tmp_path: Path) -> None:
    from tiny_base import sums
    from tiny_pipeline import write_images

    with pytest.raises(RequestInvalid, match="The dataset is jsonl"):
        learn(imaging, rows=sums(3))
    for name in ("q_proj", "conv_in"):  # a convolution is there, and is adapted by no method
        with pytest.raises(RequestInvalid, match=f"no linear layer called '{name}'"):
            imaging.run("bone", {"target_modules": [name]}, task=TASK, steps=1)
    imaging.data = DataFile(write_images(tmp_path / "one.zip", 1), "images")
    with pytest.raises(RequestInvalid, match="row is left"):
        learn(imaging)
    imaging.base_files = BaseFiles("tiny", str(tiny_base))
    with pytest.raises(RequestInvalid, match="The base model 'tiny' can not be loaded"):
        learn(imaging)


def test_a_pipeline_is_known_by_the_linear_layers_of_its_unet(pipeline: Path, tmp_path: Path) -> None:
    found = inspect_base(pipeline)
    assert (found.architecture, found.pipeline) == ("UNet2DConditionModel", "StableDiffusionPipeline")
    assert found.tokenizer_digest is not None
    assert found.fingerprint is not None
    sides = {path: (d_out, d_in) for path, d_out, d_in in found.fingerprint}
    assert sides["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"] == (32, 16)
    assert "conv_in" not in sides
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FormatUnknown, match="without a folder unet"):
        inspect_base(tmp_path)
    (tmp_path / "unet").mkdir()
    with pytest.raises(FormatUnknown, match="does not name the class"):
        inspect_base(tmp_path)


def test_noise_and_v_at_each_level() -> None:
    """v = √ᾱ·ε − √(1−ᾱ)·x, so that x = √ᾱ·x_t − √(1−ᾱ)·v and ε = √(1−ᾱ)·x_t + √ᾱ·v."""
    alphas = torch.tensor([0.99, 0.5, 0.01])
    x, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    level = torch.arange(3)
    sample, epsilon = Noising(alphas, "epsilon").noised(x, noise, level)
    again, v = Noising(alphas, "v-prediction").noised(x, noise, level)
    kept, added = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(sample, again)
    torch.testing.assert_close(epsilon, noise)
    torch.testing.assert_close(kept * sample - added * v, x)
    torch.testing.assert_close(added * sample + kept * v, noise)


def test_draws_are_by_seed_epoch_and_row_and_not_by_the_batch() -> None:
    shape, levels = (4, 8, 8), 100
    batch = draws(3, 1, range(1, 201), shape, levels)
    apart = draws(3, 1, [7], shape, levels)
    assert [part.shape for part in apart] == [(1, *shape), (1, *shape), (1, 4, 1, 1), (1,), (1,)]
    assert all(torch.equal(whole[6:7], part) for whole, part in zip(batch, apart, strict=True))
    for other in (draws(3, 1, [8], shape, levels), draws(3, 2, [7], shape, levels), draws(4, 1, [7], shape, levels)):
        assert not torch.equal(other.latents, apart.latents)
        assert not torch.equal(other.noise, apart.noise)
    for normal in (batch.latents, batch.noise, batch.offset):
        assert normal.dtype == torch.float32
        assert float(normal.mean()) == pytest.approx(0.0, abs=0.1)
        assert float(normal.std()) == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(batch.latents, batch.noise)
    assert 0 <= int(batch.level.min()) < 10 < 90 <= int(batch.level.max()) < levels
    assert float((batch.caption < 0.25).float().mean()) == pytest.approx(0.25, abs=0.1)


def test_min_snr_weights_are_those_of_the_paper() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.0])  # SNR 9, 1, 0
    level = torch.arange(3)
    assert Noising(alphas, "epsilon").weights(level, 5.0).tolist() == pytest.approx([5 / 9, 1.0, 1.0])
    assert Noising(alphas, "v-prediction").weights(level, 5.0).tolist() == pytest.approx([5 / 10, 1 / 2, 0.0])
    assert Noising(alphas, "epsilon").weights(level, None).tolist() == [1.0, 1.0, 1.0]


def test_the_process_is_that_of_the_scheduler() -> None:
    config = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.1, "beta_schedule": "linear"}
    found = noising_of(config | {"prediction_type": "v_prediction"}, "auto")
    assert (found.prediction, found.levels) == ("v-prediction", 10)
    assert found.alphas.tolist() == pytest.approx([math.pow(0.9, step + 1) for step in range(10)])
    with pytest.raises(RequestInvalid, match="scheduler predicts 'sample'"):
        noising_of(config | {"prediction_type": "sample"}, "auto")


def test_figures_of_images_are_weighted_means() -> None:
    scores = ImageScores(np.array([1.0, 3.0]))
    assert scores.figures(np.array([[1.0, 1.0], [2.0, 0.0]]))["loss"].tolist() == [2.0, 1.0]
    assert scores.to_lists() == {"losses": [1.0, 3.0]}
