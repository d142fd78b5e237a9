"""Trains ShapesSD from nothing: VAE, text encoder, UNet. Interrupted, it goes on from where it was.

    python -m examples.shapes_sd.train_base --work WORK                          one process
    python -m examples.shapes_sd.train_base --work WORK --processes 2            two, of one thread each
    python -m examples.shapes_sd.train_base --work WORK --export DIRECTORY       write the pipeline, in half precision

Two processes of one thread are faster than one of two: the tensors are small.
"""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.multiprocessing as processes
from diffusers import StableDiffusionPipeline

from examples.shapes_sd.train_text import train_text
from examples.shapes_sd.train_unet import Plan, Trainer, join, make_pool, make_scheduler
from examples.shapes_sd.train_vae import train_vae


def trainer_of(plan: Plan) -> Trainer:
    """With everything before it trained."""
    vae = train_vae(plan.folder / "vae")
    tokenizer, encoder = train_text(plan.folder / "text")
    return Trainer(plan, tokenizer, encoder, make_pool(vae))


def work(rank: int, arguments: argparse.Namespace, port: int) -> None:
    """One process."""
    torch.set_num_threads(1)
    world = arguments.processes
    if world > 1:
        join(rank, world, port)
    trainer_of(Plan(arguments.work, arguments.steps, arguments.batch // world, rank, world)).run()


def export(folder: Path, target: Path) -> None:
    """The averaged weights as a pipeline in fp16 safetensors."""
    vae = train_vae(folder / "vae")
    tokenizer, encoder = train_text(folder / "text")
    trainer = Trainer(Plan(folder, 1, 1), tokenizer, encoder, make_pool(vae, 1))
    state = torch.load(folder / "training.pt", weights_only=True)
    trainer.average.load_state_dict(state["average"])
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=trainer.average["text_encoder"],
        tokenizer=tokenizer,
        unet=trainer.average["unet"],
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(torch.float16)
    pipeline.save_pretrained(target)
    _forget_origin(target / "vae" / "config.json")
    print(f"step {state['step']} → {target}")


def _forget_origin(path: Path) -> None:
    """The folder that the VAE was read from is nobody's business."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the state")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=24, help="of all processes together")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--export", type=Path, help="train nothing; write the pipeline here")
    arguments = parser.parse_args(words)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.export:
        export(arguments.work, arguments.export)
        return
    train_vae(arguments.work / "vae")
    train_text(arguments.work / "text")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if arguments.processes == 1:
        work(0, arguments, port)
    else:
        processes.start_processes(work, (arguments, port), nprocs=arguments.processes, start_method="spawn")


if __name__ == "__main__":
    main()
