"""Pipelines that stay loaded, and their adapters: a bounded number of either."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from artifacts.errors import ComposeRefused, FieldError
from artifacts.layout import CONFIG_NAME
from compose.adapter_files import COMPONENTS, UNET, check_fits, read_adapter, weights_file
from compose.adapter_switch import activate, rest, restored, tuner_layers
from compose.pipeline_facts import SUPPORTED, base_refused, pipeline_kind
from compose.precision import Precision

MAX_ADAPTERS = 16
MAX_PIPELINES = 1


@dataclass(slots=True)
class LoadedPipeline:
    """A pipeline and the adapters in it. One request at a time: take `lock` around everything.

    Between requests no adapter acts and nothing is trainable.

    Attributes:
        max_adapters: so many stay loaded; a request that needs more has them until it ends.
        names: of the adapters in the pipeline, the least recently used first, by their file's identity.
    """

    pipeline: Any
    max_adapters: int = MAX_ADAPTERS
    lock: threading.Lock = field(default_factory=threading.Lock)
    names: OrderedDict[str, str] = field(default_factory=OrderedDict)

    @classmethod
    def load(
        cls,
        base: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_adapters: int = MAX_ADAPTERS,
    ) -> LoadedPipeline:
        """Read the folder of a pipeline: safetensors only, no code, nothing from a hub.

        Raises:
            ComposeRefused: it is another kind of pipeline, incomplete, or of a kind of UNet that has no place here.
        """
        import diffusers

        kind = pipeline_kind(base)
        # diffusers checks the types of components that are given, so that the checker is left out explicitly.
        extra: dict[str, Any] = (
            {"safety_checker": None, "requires_safety_checker": False} if kind == SUPPORTED[0] else {}
        )
        try:
            with no_bars():
                pipeline = getattr(diffusers, kind).from_pretrained(
                    str(base), dtype=dtype, use_safetensors=True, local_files_only=True, **extra
                )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise base_refused(f"The base model {base.name!r} can not be loaded: {error}") from error
        return cls.of(pipeline.to(device), max_adapters=max_adapters)

    @classmethod
    def of(cls, pipeline: Any, *, max_adapters: int = MAX_ADAPTERS) -> LoadedPipeline:
        """Around a pipeline that is loaded already. Raises ComposeRefused."""
        _check_pipeline(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        loaded = cls(pipeline, max_adapters)
        for model in loaded.models:
            model.requires_grad_(False).eval()
        pipeline.vae.requires_grad_(False).eval()
        return loaded

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def text_encoders(self) -> list[Any]:
        found = [getattr(self.pipeline, name, None) for name in COMPONENTS[1:]]
        return [item for item in found if item is not None]

    @property
    def models(self) -> list[nn.Module]:
        """Whatever can hold adapters."""
        return [self.unet, *self.text_encoders]

    @property
    def parts(self) -> list[nn.Module]:
        """All that takes memory."""
        return [*self.models, self.pipeline.vae]

    @property
    def is_xl(self) -> bool:
        return type(self.pipeline).__name__ == SUPPORTED[1]

    @property
    def device(self) -> torch.device:
        # diffusers' own properties walk through all modules, in every pass
        found: torch.device = next(self.unet.parameters()).device
        return found

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = next(self.unet.parameters()).dtype
        return found

    @property
    def vae_factor(self) -> int:
        """Pixels a side that are one latent pixel."""
        return int(self.pipeline.vae_scale_factor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """A request: afterwards the pipeline is as it was, but for the adapters that stay loaded, at rest."""
        try:
            with restored(*self.models):
                yield
        finally:
            self.evict(self.max_adapters)

    def adapter(self, path: Path, name: str, pointer: str) -> str:
        """The name within the pipeline of an adapter, which is loaded if it is not yet.

        Args:
            name, pointer: what it is called, and where it stands in the request.

        Raises:
            PickleRefused, FormatUnknown, FileBroken, ComposeRefused.
        """
        if not path.exists():
            detail = f"The adapter {name!r} is not there any more"
            raise ComposeRefused(f"{detail}.", hint="It was deleted.", errors=[FieldError(pointer, detail)])
        identity = _identity(path)
        if identity not in self.names:
            self._load(path, name, pointer, identity)
        self.names.move_to_end(identity)
        return self.names[identity]

    def _load(self, path: Path, name: str, pointer: str, identity: str) -> None:
        weights = read_adapter(path, self.pipeline, name)
        check_fits(weights, self.pipeline, name, pointer)
        internal = f"rankwise_{identity[:16]}"
        try:
            with warnings.catch_warnings():
                # PEFT says so of every second adapter; having several is the point.
                warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
                self._inject(weights, internal)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._delete(internal)
            raise ComposeRefused(
                f"The adapter {name!r} can not be loaded into the base model: {error}",
                errors=[FieldError(pointer, "can not be loaded into the base model")],
            ) from error
        self.names[identity] = internal
        for model in self.models:
            rest(model)

    def _inject(self, weights: Any, internal: str) -> None:
        metadata = None if weights.metadata is None else dict(weights.metadata)
        for component in COMPONENTS:
            state, model = weights.of(component), getattr(self.pipeline, component, None)
            if not state:
                continue
            if model is None:
                raise ValueError(f"it has weights for {component}, which this pipeline does not have")
            options = {"network_alphas": weights.alphas or None, "adapter_name": internal, "metadata": metadata}
            if component == UNET:
                model.load_lora_adapter(state, prefix=UNET, **options)
            else:
                self.pipeline.load_lora_into_text_encoder(state, text_encoder=model, prefix=component, **options)
            wanted = sum(".lora_A." in key or ".down." in key for key in state)
            layers = [layer for layer in tuner_layers(model) if internal in layer.scaling]
            if len(layers) != wanted:
                raise ValueError(f"{len(layers)} of its {wanted} modules found a place in {component}")
            for layer in layers:
                # in the base's precision and place, so that a switch costs no conversion
                for part in layer.adapter_layer_names:
                    container = getattr(layer, part)
                    if internal in container:
                        container[internal].to(device=model.device, dtype=model.dtype)

    def _delete(self, internal: str) -> None:
        from diffusers.utils.peft_utils import delete_adapter_layers

        for model in self.models:
            delete_adapter_layers(model, internal)
            configs = getattr(model, "peft_config", None)
            if configs:
                configs.pop(internal, None)
        if not self.names:
            self.pipeline.unload_lora_weights()

    def evict(self, most: int) -> None:
        """Unload the least recently used adapters until so many are left; with none left, the layers that held them
        are gone too."""
        if len(self.names) <= most:
            return
        while len(self.names) > most:
            _, internal = self.names.popitem(last=False)
            self._delete(internal)
        for model in self.models:
            rest(model)

    def activate_unet(self, weights: Mapping[str, float]) -> None:
        """Exactly these adapters act in the UNet."""
        activate(self.unet, weights)

    def activate_text(self, weights: Mapping[str, float]) -> None:
        """Exactly these adapters act in the text encoders, as far as they have a part there."""
        for model in self.text_encoders:
            activate(model, weights)


@dataclass(slots=True)
class PipelineCache:
    """The pipelines that stay in memory, the most recently used last.

    Attributes:
        most: so many; the least recently used goes first.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    most: int = MAX_PIPELINES
    max_adapters: int = MAX_ADAPTERS
    loaded: OrderedDict[Path, LoadedPipeline] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, precision: Precision, device: str) -> PipelineCache:
        """Of pipelines in a precision that is known by its name."""
        return cls(dtype=getattr(torch, precision), device=device)

    def get(self, base: Path) -> LoadedPipeline:
        """The pipeline of a folder. Raises ComposeRefused."""
        key = base.resolve()
        with self.lock:
            if key not in self.loaded:
                while len(self.loaded) >= max(1, self.most):
                    self.loaded.popitem(last=False)
                self.loaded[key] = LoadedPipeline.load(
                    base, dtype=self.dtype, device=self.device, max_adapters=self.max_adapters
                )
            self.loaded.move_to_end(key)
            return self.loaded[key]


def from_hub(name: str, revision: str | None) -> Path:
    """The folder of a pipeline of the Hugging Face hub, downloaded if it is not in the hub's own cache: safetensors
    only, no code.

    Raises:
        ComposeRefused: it can not be had.
    """
    import diffusers

    try:
        with no_bars():
            found = diffusers.DiffusionPipeline.download(name, revision=revision, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise base_refused(f"The base model {name!r} can not be had from the hub: {error}") from error
    return Path(found)


@contextmanager
def no_bars() -> Iterator[None]:
    """Bars of progress are for a terminal; here they would fill logs."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _check_pipeline(pipeline: Any) -> None:
    unet = pipeline.unet
    if type(pipeline).__name__ not in SUPPORTED:
        raise base_refused(f"{type(pipeline).__name__} is none of {', '.join(SUPPORTED)}.")
    if hasattr(unet, "_orig_mod"):
        raise base_refused("The UNet was compiled with torch.compile, which attention maps can not be read from.")
    config = unet.config
    if config.in_channels != pipeline.vae.config.latent_channels:
        raise base_refused(f"The UNet takes {config.in_channels} channels, more than a latent: an inpainting model?")
    if getattr(config, "time_cond_proj_dim", None) is not None:
        raise base_refused("The UNet was distilled to take its guidance as an input (a consistency model).")
    if getattr(config, "class_embed_type", None) or getattr(config, "encoder_hid_dim_type", None):
        raise base_refused("The UNet takes more than text and a time.")


def _identity(path: Path) -> str:
    """Of an adapter's files: other files, or other contents of the same ones, are another adapter.

    Two adapters may share their weights and have other configurations; and one may be reached by several links.
    """
    files = [weights_file(path), *([path / CONFIG_NAME] if (path / CONFIG_NAME).is_file() else [])]
    found = [file.stat() for file in files]
    text = "\0".join(f"{item.st_dev} {item.st_ino} {item.st_size} {item.st_mtime_ns}" for item in found)
    return hashlib.sha256(text.encode()).hexdigest()
