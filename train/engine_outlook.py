"""Whether an engine will load what a training makes, from the request alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from artifacts.compatibility import Engine, Finding
from artifacts.declared_types import DECLARED_TYPES
from artifacts.engine_outlook import check_engine, planned, refuse
from artifacts.manifest import LoraModule
from train.menu_row import Form, Method
from train.options.common import Target, TrainOptions
from train.settings import TaskName

OF_IMAGES: frozenset[Engine] = frozenset({"diffusers", "kohya", "comfy"})
"""Engines that run image models and nothing else."""
_OTHER_ENGINES = "docs/how-to/download.md"
_HEADS: Mapping[str, tuple[str, ...]] = {
    "sequence-classification": ("score",),
    "token-classification": ("classifier",),
    "transcript-classification": ("classifier",),
}
"""What a task trains whole, by the name that most models have for it."""
_PLACES = {
    "vllm-rank": "/parameters/rank",
    "vllm-modules-to-save": "/task",
    "llama-cpp-tensors": "/task",
    "language-model": "/task",
    "plain-lora": "/method",
    "peft-type": "/method",
    "transformers-prompt-learning": "/method",
    "transformers-shared-state": "/method",
    "transformers-dora": "/method",
}


def check_trained(
    method: Method, options: TrainOptions, task: TaskName, targets: Sequence[Target], engine: Engine
) -> None:
    """Refuse a training whose adapter the engine will not load.

    Args:
        targets: the layers that get an adapter; none where they are not known yet.

    Raises:
        RequestInvalid: a finding for every rule that refuses, with the rule's source.
    """
    form = method.form(options)
    if form.exports == "model":
        _refuse(engine, "no-adapter", f"{method.name} makes a model here, and no adapter", "/method")
    if (task == "text-to-image") != (engine in OF_IMAGES) and engine not in ("peft", "transformers"):
        runs = "image models" if engine in OF_IMAGES else "language models"
        _refuse(engine, "kind-of-model", f"{engine} runs {runs}; the task is {task}", "/task")
    rank = options.certain_rank
    modules = [_module(target, rank) for target in targets]
    heads = _HEADS.get(task, ())
    config = _config(form, rank) | ({"modules_to_save": list(heads)} if heads else {})
    refusal = None if form.exports == "lora" else f"it is of type {form.exports}"
    name = "dora" if form.exports == "dora" else "lora"
    if engine in OF_IMAGES:
        # The file of such a training is diffusers' own, whose names only its reader tells.
        if refusal is not None:
            _refuse(engine, f"{engine}-names", f"{engine} applies LoRA; {method.name} makes {form.exports}", "/method")
        return
    check_engine(planned(modules, config, rank=rank, method=name, refusal=refusal, whole=heads), engine, _PLACES)


def _refuse(engine: Engine, rule: str, message: str, pointer: str) -> None:
    refuse(engine, [Finding(rule, "refuses", pointer, message, "", _OTHER_ENGINES)], {rule: pointer})


def _config(form: Form, rank: int) -> dict[str, object]:
    own = next((kind for kind, found in DECLARED_TYPES.items() if found.method == form.exports), None)
    kind = "LORA" if form.exports in ("lora", "dora") else own or form.exports.upper()
    return {"peft_type": kind, "r": rank, "lora_alpha": rank, "use_dora": form.exports == "dora"}


def _module(target: Target, rank: int) -> LoraModule:
    return LoraModule(
        path=target.path,
        kind="linear",
        a_key=f"base_model.model.{target.path}.lora_A.weight",
        b_key=f"base_model.model.{target.path}.lora_B.weight",
        rank=rank,
        alpha=rank,
        scaling=1.0,
        d_in=target.d_in,
        d_out=target.d_out,
        a_shape=(rank, target.d_in),
        b_shape=(target.d_out, rank),
        dtype="F32",
    )
