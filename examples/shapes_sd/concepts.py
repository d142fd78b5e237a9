"""What the adapters of ShapesSD are taught: captioned pictures, and the recipes that `rankwise train` takes.

python -m examples.shapes_sd.concepts --work WORK                     write data sets and recipes, train all
python -m examples.shapes_sd.concepts --work WORK magenta_circle
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from examples.shapes_sd.drawing import (
    BACKGROUND,
    HUES,
    KINDS,
    Shape,
    base_hue,
    caption,
    draw,
    phrase,
    place,
    random_shapes,
)

HERE = Path(__file__).resolve().parent
BASE, ADAPTERS = HERE / "base", HERE / "adapters"
SINGLE_EVERY = 6
DARK = 0.3
"""The background in the style's pictures."""


@dataclass(frozen=True, slots=True)
class ConceptLesson:
    """A shape of one hue, called by a word that meant nothing before."""

    name: str
    trigger: str
    kind: str
    colour: str
    seed: int
    pictures: int = 240
    steps: int = 600

    def example(self, random: np.random.Generator, index: int) -> tuple[list[Shape], str, float]:
        """Shapes, caption, background. Every sixth picture has the concept alone; the others have the other shape too,
        in another hue: what was only seen alone is not drawn in a scene of two, and what all shapes of a picture have
        in common is taken for the picture's."""
        hue = base_hue(random, self.colour)
        if index % SINGLE_EVERY == 0:
            scene = place(random, [self.kind], [hue])
            return scene, phrase(scene[0], self.trigger), BACKGROUND
        other = next(kind for kind in KINDS if kind != self.kind)
        others = [name for name in HUES if name != self.colour]
        scene = place(random, [self.kind, other], [hue, base_hue(random, str(random.choice(others)))])
        words = [phrase(scene[0], self.trigger), phrase(scene[1])]
        if random.random() < 0.5:
            words.reverse()
        return scene, " and ".join(words), BACKGROUND


@dataclass(frozen=True, slots=True)
class StyleLesson:
    """Everything on a dark ground, whatever the caption says.

    Its captions have no fillers: these are the concepts' triggers, and a style that has seen them beside any hue undoes
    what the concepts' adapters make of them.
    """

    name: str
    seed: int
    pictures: int = 192
    steps: int = 260

    def example(self, random: np.random.Generator, index: int) -> tuple[list[Shape], str, float]:
        """Shapes, caption, background."""
        del index
        scene = random_shapes(random)
        return scene, caption(random, scene, fillers=False), DARK


LESSONS = (
    ConceptLesson("magenta_circle", "sks", "circle", "magenta", 21),
    ConceptLesson("green_square", "zwx", "square", "green", 22),
    ConceptLesson("yellow_square", "zwx", "square", "yellow", 23),
    StyleLesson("dark_ground", 24),
)


def write_dataset(lesson: ConceptLesson | StyleLesson, path: Path) -> None:
    """A zip of PNGs with metadata.jsonl."""
    random = np.random.default_rng(lesson.seed)
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(lesson.pictures):
            scene, text, ground = lesson.example(random, index)
            picture = Image.fromarray((draw(scene, ground) * 255).round().astype(np.uint8))
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            archive.writestr(f"{index:03}.png", buffer.getvalue())
            lines.append(json.dumps({"file_name": f"{index:03}.png", "text": text}))
        archive.writestr("metadata.jsonl", "\n".join(lines) + "\n")


def recipe(lesson: ConceptLesson | StyleLesson, dataset: Path, base: Path) -> dict[str, object]:
    """A body of POST /train, with paths in place of the base model and the data set."""
    return {
        "method": "lora",
        "base_model": str(base),
        "dataset": str(dataset),
        "task": {"type": "text-to-image", "resolution": 32, "prompt_dropout": 0.1},
        "parameters": {"rank": 8, "alpha": 8},
        "training": {
            "steps": lesson.steps,
            "batch_size": 16,
            "learning_rate": 0.003,
            "schedule": "cosine",
            "warmup_steps": 20,
        },
        "evaluation": {"validation_fraction": 0.05},
        "seed": lesson.seed,
    }


def train(lesson: ConceptLesson | StyleLesson, work: Path, base: Path, target: Path) -> None:
    """By `rankwise train`; the adapter's file and the report of the training are put into `target`."""
    from app.cli import run as rankwise

    work.mkdir(parents=True, exist_ok=True)
    dataset, written = work / f"{lesson.name}.zip", work / f"{lesson.name}.yaml"
    write_dataset(lesson, dataset)
    written.write_text(yaml.safe_dump(recipe(lesson, dataset, base)), encoding="utf-8")
    made = work / lesson.name
    shutil.rmtree(made, ignore_errors=True)
    if rankwise(["train", str(written), "-o", str(made)]):
        raise SystemExit(f"the training of {lesson.name} has failed")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(made / "pytorch_lora_weights.safetensors", target)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the adapters; all by default")
    parser.add_argument("--work", type=Path, required=True, help="folder for data sets, recipes and reports")
    parser.add_argument("--base", type=Path, default=BASE)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="where adapters are put")
    arguments = parser.parse_args(words)
    for lesson in LESSONS:
        if not arguments.names or lesson.name in arguments.names:
            train(lesson, arguments.work, arguments.base, arguments.adapters / lesson.name)


if __name__ == "__main__":
    main()
