"""What a base model must be able to do before anything is measured on it.

    python -m examples.shapes_sd.gates DIRECTORY

On a base whose words have no place in the picture no method of composition does better than chance, so that a bad
figure there says nothing about the method.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from compose.attention_maps import MapRecorder, map_factor
from compose.pipelines import LoadedPipeline
from examples.shapes_sd.drawing import Pixels
from examples.shapes_sd.scorer import Found, components
from examples.shapes_sd.train_text import nouns, token_ids

STEPS, GUIDANCE = 16, 3.0
SEEDS = range(3000, 3032)
PAIR = "a circle and a square"
EARLY, HALF = 4, 8
"""Steps in which maps are looked at."""
THRESHOLD = 0.4
SINGLE, BOTH, LOCAL, COVERED = 0.8, 0.5, 0.8, 0.9
COVERAGE = (0.05, 0.4)


@dataclass(frozen=True, slots=True)
class Gates:
    """Shares of the seeds.

    Attributes:
        circle, square: "a circle" gives exactly one shape, a circle; "a square" likewise.
        pair: "a circle and a square" gives exactly these two.
        local_early, local: of the pictures with exactly these two, by noun: its map is higher at its own shape than at
            the other one, in steps 4 and 8 of 16.
        covered: by noun, cells above 0.4 of the map's maximum in step 8 are between 5 % and 40 % of the picture.
    """

    circle: float
    square: float
    pair: float
    local_early: dict[str, float]
    local: dict[str, float]
    covered: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """What is below its gate."""
        figures = {
            "circle": (self.circle, SINGLE),
            "square": (self.square, SINGLE),
            "pair": (self.pair, BOTH),
            **{f"map of {noun}, step {EARLY}": (value, LOCAL) for noun, value in self.local_early.items()},
            **{f"map of {noun}, step {HALF}": (value, LOCAL) for noun, value in self.local.items()},
            **{f"coverage of {noun}": (value, COVERED) for noun, value in self.covered.items()},
        }
        return [f"{name} {value:.2f} < {gate}" for name, (value, gate) in figures.items() if not value >= gate]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures of one prompt.

    Attributes:
        maps: by 0-based step, (n, 16, 16, tokens) of the conditional half.
    """

    pictures: list[Pixels]
    maps: dict[int, Tensor]


@torch.no_grad()
def generate(pipeline: Any, prompt: str, seeds: Sequence[int], *, watched: Sequence[int] = ()) -> Drawn:
    """By DDIM with guidance, all seeds in one batch."""
    unet, count = pipeline.unet, len(seeds)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    ids = token_ids(pipeline.tokenizer, ["", prompt])
    context = pipeline.text_encoder(ids)[0].repeat_interleave(count, dim=0)
    z = torch.cat([torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    recorder = MapRecorder(unet, map_factor(unet), (16, 16))
    maps = {}
    with recorder.installed():
        for index, timestep in enumerate(scheduler.timesteps):
            with recorder.watching():
                empty, words = unet(z.repeat(2, 1, 1, 1), timestep, encoder_hidden_states=context).sample.chunk(2)
                seen = recorder.take()[count:]
            if index in watched:
                maps[index] = seen.reshape(count, 16, 16, -1)
            z = scheduler.step(empty + GUIDANCE * (words - empty), timestep, z).prev_sample
    pixels = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    return Drawn(list((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()), maps)


def measure(pipeline: Any, seeds: Sequence[int] = SEEDS) -> Gates:
    """All gates."""
    single = {kind: _share(generate(pipeline, f"a {kind}", seeds).pictures, [kind]) for kind in ("circle", "square")}
    drawn = generate(pipeline, PAIR, seeds, watched=(EARLY, HALF))
    found = [components(picture) for picture in drawn.pictures]
    right = [index for index, items in enumerate(found) if _kinds(items) == ["circle", "square"]]
    places = {noun: token for token, noun, _ in nouns(PAIR)}
    early, late, covered = {}, {}, {}
    for noun, token in places.items():
        early[noun], late[noun] = (
            float(np.mean([_is_local(drawn.maps[step][index, :, :, token], found[index], noun) for index in right]))
            if right
            else 0.0
            for step in (EARLY, HALF)
        )
        shares = _coverage(drawn.maps[HALF][..., token])
        covered[noun] = float(((shares >= COVERAGE[0]) & (shares <= COVERAGE[1])).float().mean())
    return Gates(single["circle"], single["square"], len(right) / len(found), early, late, covered)


def _share(pictures: Sequence[Pixels], kinds: list[str]) -> float:
    return sum(_kinds(components(picture)) == kinds for picture in pictures) / len(pictures)


def _kinds(found: Sequence[Found]) -> list[str]:
    return sorted(item.kind for item in found)


def _is_local(token_map: Tensor, found: Sequence[Found], noun: str) -> bool:
    own, other = (
        next(_around(token_map, item) for item in found if (item.kind == noun) is same) for same in (True, False)
    )
    return own > other


def _around(token_map: Tensor, item: Found) -> float:
    """The mean over 3×3 cells at a shape's centre."""
    row, column = (min(max(int(value / 2), 1), 14) for value in (item.y, item.x))
    return float(token_map[row - 1 : row + 2, column - 1 : column + 2].mean())


def _coverage(maps: Tensor) -> Tensor:
    """(n,), of maps (n, 16, 16)."""
    return (maps > THRESHOLD * maps.amax(dim=(1, 2), keepdim=True)).float().mean(dim=(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    torch.set_num_threads(1)
    gates = measure(LoadedPipeline.load(parser.parse_args().directory).pipeline)
    print(json.dumps(asdict(gates), indent=1))
    print("\n".join(gates.failures) or "every gate is passed")


if __name__ == "__main__":
    main()
