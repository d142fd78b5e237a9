"""A tiny random pipeline of either kind, LoRAs for it, and requests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Toys:
    """Where things are."""

    base: Path
    first: Path
    second: Path
    peft: Path
    text: Path

    def request(self, **changes: Any) -> Any:
        """Two concepts on the tiny base; `changes` are fields of the request."""
        from compose.request import CompositionRequest, Concept

        concepts = (
            Concept(self.first, "first", "sks", "circle"),
            Concept(self.second, "second", "zwx", "square"),
        )
        return replace(
            CompositionRequest(self.base, concepts, "a circle and a square", seed=3, steps=4, width=32, height=32),
            **changes,
        )


def _toys(folder: Path, write: Callable[[Path], Path], kind: str) -> Toys:
    import diffusers
    from toy_pipelines import write_diffusers_lora, write_peft_lora

    base = write(folder / "base")
    extra = {"safety_checker": None} if kind == "StableDiffusionPipeline" else {}
    pipeline = getattr(diffusers, kind).from_pretrained(base, **extra)
    return Toys(
        base,
        write_diffusers_lora(folder / "first", pipeline, 1),
        write_diffusers_lora(folder / "second", pipeline, 2),
        write_peft_lora(folder / "peft", pipeline, 1),
        write_diffusers_lora(folder / "text", pipeline, 3, text=True),
    )


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    from toy_pipelines import write_sd

    return _toys(tmp_path_factory.mktemp("sd"), write_sd, "StableDiffusionPipeline")


@pytest.fixture(scope="session")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    from toy_pipelines import write_xl

    return _toys(tmp_path_factory.mktemp("xl"), write_xl, "StableDiffusionXLPipeline")


@pytest.fixture(params=["sd", "xl"])
def toys(request: pytest.FixtureRequest) -> Toys:
    """Either kind in turn."""
    found: Toys = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def pipelines() -> Any:
    """The pipelines of the session, loaded once."""
    from compose.pipelines import PipelineCache

    return PipelineCache(most=4)
