"""The task text-to-image: the UNet of a Stable Diffusion pipeline learns to predict noise from captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from artifacts.errors import FieldError, RequestInvalid
from artifacts.layout import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME
from artifacts.safetensors_header import read_header
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
from train.data import DataFile, Examples, check_enough, counts
from train.evaluation import Scores
from train.image_archive import ImageArchive, read
from train.records import FirstFault, Limits
from train.settings import EvaluationSettings, TextToImageTask
from train.splits import split_of
from train.tasks.denoising import Draws, Target, draws, noising_of
from train.tasks.protocol import Loss, Task, TaskContext
from train.tasks.rows import RowFaults
from train.tasks.stable_diffusion import PipelineFiles, longest_caption, pixels_of
from train.tasks.text_batches import device_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""
_PEFT_PREFIX, _UNET_PREFIX = "base_model.model.", "unet."
_STORED = Limits(max_bytes=2**62)


@dataclass(frozen=True, slots=True)
class ImageExample:
    """An image as the VAE and the text encoder see it; both arrays lie on disk.

    Attributes:
        number: its row, from 1.
        latents: (2·c, h, w) mean and standard deviation of the image's latents.
        context: (tokens, d) what the text encoder makes of its caption.
    """

    number: int
    latents: NDArray[np.float32]
    context: NDArray[np.float32]


class TextToImage(Task[TextToImageTask]):
    """What VAE and text encoder give is computed once, before the UNet is loaded."""

    peft_type: ClassVar[str | None] = None
    checkpointing_by_trainer: ClassVar[bool] = False
    predicted: ClassVar[str] = "predictions"

    def __init__(self, settings: TextToImageTask, context: TaskContext) -> None:
        super().__init__(settings, context)
        self.files = PipelineFiles(self.base)
        self.files.check()
        self.noising = noising_of(self.files.scheduler_config(), settings.prediction)

    def read(self, file: DataFile, evaluation: EvaluationSettings) -> Examples:
        if file.format != "images":
            problem = f"the dataset is {file.format}; text-to-image needs a zip of images"
            raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/dataset", problem)])
        with file.path.open("rb") as opened:
            rows = list(read(opened, _STORED, FirstFault()))
            images = ImageArchive(opened, _STORED)
            latents, held_out = self._encode_images(images, rows, evaluation.validation_fraction)
        places, contexts, cut = self._encode_captions([row["text"] for _, row in rows])
        examples = [
            ImageExample(number, latents[place], contexts[places[row["text"]]])
            for place, (number, row) in enumerate(rows)
        ]
        self.empty = torch.from_numpy(np.array(contexts[places[""]]))
        train = tuple(example for example in examples if example.number not in held_out)
        validation = tuple(example for example in examples if example.number in held_out)
        check_enough(train, "training")
        if evaluation.validation_fraction:
            check_enough(validation, "validation")
        report = counts(
            train,
            validation,
            evaluation,
            resolution=self.settings.resolution,
            captions_cut=cut,
            prediction=self.noising.prediction,
        )
        return Examples(train, validation[: evaluation.max_rows], report)

    @torch.no_grad()
    def _encode_images(
        self, images: ImageArchive, rows: Sequence[tuple[int, Mapping[str, Any]]], fraction: float
    ) -> tuple[NDArray[np.float32], set[int]]:
        """(rows, 2·c, h, w) on disk, and the numbers of the rows that are held out."""
        vae = self.files.vae(self.device)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        side = self.settings.resolution // factor
        if side * factor != self.settings.resolution:
            problem = f"resolution {self.settings.resolution} is no multiple of {factor}, the factor of the base's VAE"
            raise RequestInvalid(f"{problem}.", errors=[FieldError("/task/resolution", problem)])
        self.scale = float(vae.config.scaling_factor)
        self.shift = float(getattr(vae.config, "shift_factor", None) or 0.0)
        found = self._on_disk("latents", (len(rows), 2 * int(vae.config.latent_channels), side, side))
        faults, held_out = RowFaults(), set()
        for place, (number, row) in enumerate(rows):
            name = row["file_name"]
            try:
                digest = hashlib.sha256(images.read(name, _STORED.max_image_bytes)).hexdigest()
                pixels = pixels_of(images.image(name), self.settings.resolution)
            except ValueError as error:
                faults.add(number, str(error))
                continue
            # by the image and its caption: the name of a file is nothing that is learned
            if split_of({"image": digest, "text": row["text"]}, fraction) == "validation":
                held_out.add(number)
            posterior = vae.encode(pixels[None].to(self.device)).latent_dist
            found[place] = torch.cat([posterior.mean, posterior.std], dim=1)[0].cpu().numpy()
        faults.check("Correct these images and upload the archive again.")
        return found, held_out

    @torch.no_grad()
    def _encode_captions(self, texts: Sequence[str]) -> tuple[dict[str, int], NDArray[np.float32], int]:
        """Caption → place in (captions, tokens, d) on disk, each once and the empty one too; how many were cut."""
        tokenizer, encoder = self.files.tokenizer(), self.files.text_encoder(self.device)
        length = longest_caption(tokenizer, encoder)
        places = {text: place for place, text in enumerate(dict.fromkeys(["", *texts]))}
        cut = {text for text in places if len(tokenizer(text).input_ids) > length}
        contexts = self._on_disk("captions", (len(places), length, int(encoder.config.hidden_size)))
        for text, place in places.items():
            ids = tokenizer(
                text, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
            contexts[place] = encoder(ids.to(self.device))[0][0].float().cpu().numpy()
        return places, contexts, sum(text in cut for text in texts)

    def _on_disk(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        self.folder.mkdir(parents=True, exist_ok=True)
        made: NDArray[np.float32] = np.lib.format.open_memmap(
            self.folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape
        )
        return made

    def load(self) -> nn.Module:
        return self.files.unet(self.training.precision, self.device)

    def before_training(self, model: Any) -> None:
        if self.training.gradient_checkpointing:
            model.enable_gradient_checkpointing()

    def collate(self, examples: Sequence[ImageExample]) -> dict[str, Tensor]:
        """latents (rows, 2·c, h, w), context (rows, tokens, d), number (rows,); `labels` are the latents' means."""
        latents = torch.from_numpy(np.stack([example.latents for example in examples]))
        context = torch.from_numpy(np.stack([example.context for example in examples]))
        number = torch.tensor([example.number for example in examples])
        return {"latents": latents, "context": context, "number": number, "labels": latents.chunk(2, dim=1)[0]}

    def step_inputs(self, batch: dict[str, Any], epoch: int) -> dict[str, Any]:
        """Draws latents, noise, its level, and which captions are left out."""
        settings, context = self.settings, batch["context"]
        mean, deviation = batch["latents"].chunk(2, dim=1)
        _, *shape = mean.shape
        on_cpu = draws(self.seed, epoch, batch["number"].tolist(), (shape[0], shape[1], shape[2]), self.noising.levels)
        drawn = Draws(*(value.to(mean.device) for value in on_cpu))
        latents = self._scaled(mean + deviation * drawn.latents)
        noise = drawn.noise + settings.noise_offset * drawn.offset
        left_out = drawn.caption < settings.prompt_dropout
        context = torch.where(left_out.view(-1, 1, 1), self.empty.to(mean.device), context)
        weight = self.noising.weights(drawn.level, settings.min_snr_gamma)
        return self._inputs(latents, noise, drawn.level, context, weight)

    def _inputs(self, latents: Tensor, noise: Tensor, level: Tensor, context: Tensor, weight: Tensor) -> dict[str, Any]:
        sample, target = self.noising.noised(latents, noise, level)
        dtype = getattr(torch, self.training.precision)
        return {
            "sample": sample.to(dtype),
            "timestep": level,
            "encoder_hidden_states": context.to(dtype),
            "labels": Target(target, weight),
        }

    def _scaled(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) * self.scale

    def loss(self) -> Loss:
        return _loss

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        examples: Sequence[ImageExample],
        evaluation: EvaluationSettings,
        tick: Callable[[int], None],
    ) -> ImageScores:
        """The mean squared error at fixed levels with fixed noises: the same for every model."""
        model.eval()
        found = []
        for place, example in enumerate(examples):
            tick(place)
            inputs = self._fixed(example, self.settings.evaluation_draws, device_of(model))
            target = inputs.pop("labels").value
            found.append(float((model(**inputs).sample.float() - target).square().mean()))
        return ImageScores(np.array(found))

    def _fixed(self, example: ImageExample, draws: int, device: torch.device) -> dict[str, Any]:
        """Inputs at `draws` levels, evenly spaced."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + example.number)
        mean = self._scaled(torch.from_numpy(np.array(example.latents)).chunk(2)[0]).expand(draws, -1, -1, -1)
        noise = torch.randn(mean.shape, generator=generator)
        level = ((torch.arange(draws) + 0.5) * self.noising.levels / draws).long()
        context = torch.from_numpy(np.array(example.context)).expand(draws, -1, -1)
        return self._inputs(
            mean.to(device), noise.to(device), level.to(device), context.to(device), torch.ones(draws, device=device)
        )

    def scores_of(self, columns: Mapping[str, Any]) -> ImageScores:
        return ImageScores(np.array(columns["losses"]))

    @torch.no_grad()
    def predict(self, model: nn.Module, examples: Sequence[ImageExample]) -> list[Tensor]:
        """What the UNet predicts at one fixed noise, (c, h, w) each."""
        found = []
        for example in examples:
            inputs = self._fixed(example, 1, device_of(model))
            del inputs["labels"]
            found.append(model(**inputs).sample[0].float().cpu())
        return found

    def finish(self, directory: Path) -> None:
        """A LoRA gets the form of diffusers: one file with the configuration inside. Others stay as PEFT has them."""
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
        if config["peft_type"] != "LORA":
            return
        path = directory / WEIGHTS_NAME
        infos = read_header(path).tensors
        tensors = {_UNET_PREFIX + name.removeprefix(_PEFT_PREFIX): value for name, value in load_file(path).items()}
        types = {_UNET_PREFIX + name.removeprefix(_PEFT_PREFIX): info.dtype for name, info in infos.items()}
        document = {f"{_UNET_PREFIX}{field}": value for field, value in config.items()}
        metadata = {"format": "pt", METADATA_KEY: json.dumps(document, sort_keys=True)}
        entries = [TensorEntry(name, types[name], tuple(value.shape)) for name, value in sorted(tensors.items())]
        with SafetensorsWriter(directory / DIFFUSERS_WEIGHTS, entries, metadata) as writer:
            for name, value in tensors.items():
                writer.write(name, value)
        path.unlink()
        (directory / CONFIG_NAME).unlink()

    def reload(self, by_method: Callable[[nn.Module, Path], nn.Module], model: nn.Module, directory: Path) -> nn.Module:
        """As a pipeline's load_lora_weights does it."""
        if not (directory / DIFFUSERS_WEIGHTS).is_file():
            return by_method(model, directory)
        from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

        unet: Any = model
        state, alphas, metadata = Loader.lora_state_dict(
            str(directory), weight_name=DIFFUSERS_WEIGHTS, unet_config=unet.config, return_lora_metadata=True
        )
        Loader.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
        return model


@dataclass(frozen=True, slots=True)
class ImageScores(Scores):
    """(rows,) mean squared errors of the predictions."""

    losses: NDArray[np.float64]

    @property
    def rows(self) -> int:
        return len(self.losses)

    def figures(self, weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        return {"loss": weights @ self.losses / weights.sum(axis=1)}

    def to_lists(self) -> dict[str, Any]:
        return {"losses": self.losses.tolist()}


def _loss(outputs: Any, labels: Target, items: Tensor) -> Tensor:
    error = (outputs.sample.float() - labels.value).square() * labels.weight.view(-1, 1, 1, 1)
    mean: Tensor = error.sum() / items.to(error.device)
    return mean
