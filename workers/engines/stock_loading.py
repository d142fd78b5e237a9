"""An adapter's file loaded by the libraries themselves: PEFT, transformers, diffusers, as their users call them."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from artifacts.errors import FieldError, RankwiseError, RequestInvalid
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, read_json
from artifacts.loading import LoadedEngine
from artifacts.safetensors_header import read_header
from workers.engines.hollow_models import HollowModel
from workers.engines.memory_bound import BoundReached, at_most

ADAPTER = "default"
MAX_MESSAGE = 500
MAX_MESSAGES = 20
ALLOWED_BYTES, ALLOWED_TIMES = 2 << 30, 4
"""What a library may take to load an adapter: so many bytes, and so many times its files, which it casts to float32."""
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OF_THE_LIBRARY = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)


@dataclass(slots=True)
class Loaded:
    """What came of it.

    Attributes:
        components: name ("" for a model that is no pipeline) → the module with the adapter in it.
        refusal: what the library raised, or None.
        warnings: what it said besides, each once, in order.
    """

    components: Mapping[str, nn.Module]
    refusal: Mapping[str, str] | None = None
    warnings: list[str] = field(default_factory=list)


class _Load(Protocol):
    def __call__(self, target: Any, path: Path) -> nn.Module | None:
        """Load the adapter at `path` into `target`; gives the model that wraps it, if one does."""
        ...


def load(engine: LoadedEngine, hollow: HollowModel, path: Path) -> Loaded:
    """Load the adapter at `path` (a PEFT directory, or one file) into the hollow model, which is changed.

    Nothing is fetched meanwhile. What a library raises is the answer, not an error.

    Raises:
        RequestInvalid: it takes far more memory than its file, as the configuration's own numbers (of virtual tokens,
            of ranks whose factors are not in the file) ask for it.
    """
    loaded = Loaded(hollow.components)
    allowed = ALLOWED_BYTES + ALLOWED_TIMES * _size(path)
    with _quiet(loaded.warnings, path), _offline():
        try:
            with at_most(allowed):
                wrapper = _LOADERS[engine](hollow.target, path)
        except BoundReached as error:
            raise RequestInvalid(
                f"To load files of {_size(path)} bytes {engine} asks for more than {allowed >> 20} MiB of memory."
                + _odd_numbers(path),
                hint="The configuration asks for it: numbers such as num_virtual_tokens or r do not fit the tensors.",
                errors=[FieldError("/adapter", f"takes more than {allowed >> 20} MiB to load")],
            ) from error
        except (RankwiseError, MemoryError):
            raise
        except Exception as error:
            text = _bounded(str(error) or repr(error), path)
            loaded.refusal = {"type": type(error).__name__, "message": text}
        else:
            if wrapper is not None:
                loaded.components = {"": wrapper}
    return loaded


def _size(path: Path) -> int:
    """Bytes of an adapter's files."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _odd_numbers(path: Path) -> str:
    """The numbers of a PEFT configuration that are above every side of a tensor of the file, in words."""
    if not path.is_dir():
        return ""
    sides = (max(info.shape, default=1) for info in read_header(path / WEIGHTS_NAME).tensors.values())
    largest = max(sides, default=1)
    numbers = {key: value for key, value in read_json(path / CONFIG_NAME).items() if type(value) is int}
    odd = sorted((-value, key) for key, value in numbers.items() if value > largest)
    if not odd:
        return ""
    listed = ", ".join(f"{key[:80]} = {-value}" for value, key in odd[:MAX_MESSAGES])
    return f" {CONFIG_NAME} says {listed}, and no side of a tensor is above {largest}."


def _peft(target: Any, path: Path) -> nn.Module:
    from peft import PeftModel

    config = _started_plainly(path)
    found: nn.Module = PeftModel.from_pretrained(
        target, str(path), adapter_name=ADAPTER, config=config, low_cpu_mem_usage=True, torch_device="cpu"
    )
    return found


def _transformers(target: Any, path: Path) -> None:
    target.load_adapter(str(path), adapter_name=ADAPTER, peft_config=_started_plainly(path))


def _diffusers(target: Any, path: Path) -> None:
    target.load_lora_weights(
        str(path.parent), weight_name=path.name, adapter_name=ADAPTER, local_files_only=True, low_cpu_mem_usage=True
    )


_LOADERS: Mapping[LoadedEngine, _Load] = MappingProxyType(
    {"peft": _peft, "transformers": _transformers, "diffusers": _diffusers}
)


def _started_plainly(path: Path) -> Any:
    """The adapter's configuration as PEFT reads it, but for an initialisation that decomposes the weights of the base:
    there are none, and every number that it would give is replaced by the file's."""
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(path))
    if isinstance(getattr(config, "init_lora_weights", None), str):
        config.init_lora_weights = True
    return config


class _Sayings(logging.Handler):
    """Collects what a library logs as a warning or worse."""

    def __init__(self, into: list[str], path: Path) -> None:
        super().__init__(logging.WARNING)
        self._into, self._path = into, path

    def emit(self, record: logging.LogRecord) -> None:
        _add(self._into, record.getMessage(), self._path)


@contextmanager
def _quiet(into: list[str], path: Path) -> Iterator[None]:
    """What the libraries say goes to `into` and nowhere else."""
    from compose.pipelines import no_bars

    handler = _Sayings(into, path)
    loggers = [logging.getLogger(name) for name in ("peft", "transformers", "diffusers")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    with no_bars(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for logger in loggers:
                logger.handlers, logger.propagate = [handler], False
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, handlers, propagate, level in before:
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
        for item in caught:
            if not issubclass(item.category, _OF_THE_LIBRARY):
                _add(into, str(item.message), path)


@contextmanager
def _offline() -> Iterator[None]:
    """A configuration may name repositories: none is asked for while an adapter of unknown origin is loaded."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _add(into: list[str], text: str, path: Path) -> None:
    message = _bounded(text, path)
    if message not in into and len(into) < MAX_MESSAGES:
        into.append(message)


def _bounded(text: str, path: Path) -> str:
    """Short, and with no folder of this machine in it."""
    plain = _COLOUR.sub("", text).replace(str(path), "the adapter").replace(f"{path.parent}/", "").strip()
    return plain if len(plain) <= MAX_MESSAGE else f"{plain[: MAX_MESSAGE - 1]}…"
