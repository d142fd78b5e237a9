"""Whether an engine will load an adapter that is yet to be made, by the rules of `artifacts.compatibility`.

Imports no torch: a request is refused here, not after the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from artifacts.compatibility import Engine, Finding, findings, loads
from artifacts.errors import FieldError, RequestInvalid
from artifacts.formats.facts import facts_of
from artifacts.manifest import AdapterManifest, IgnoredKey, IntakeReport, LoraModule

POINTER = "/target_engine"
UNEVEN = frozenset({"vllm-patterns", "llama-cpp-alpha"})
"""Rules that are met once every module has the same rank and scaling 1: the same ΔW, written otherwise."""


def parse_engine(text: str) -> Engine:
    """Raises RequestInvalid: there is no such engine."""
    known: tuple[Engine, ...] = get_args(Engine)
    for name in known:
        if name == text:
            return name
    raise RequestInvalid(
        f"there is no engine {text[:40]!r}", errors=[FieldError(POINTER, f"must be one of: {', '.join(known)}")]
    )


def planned(
    modules: Sequence[LoraModule],
    config: Mapping[str, Any],
    *,
    rank: int,
    method: str = "lora",
    refusal: str | None = None,
    whole: Sequence[str] = (),
) -> AdapterManifest:
    """What intake would say of an adapter that does not exist yet: a PEFT directory.

    Args:
        modules: as far as they are known.
        rank: the largest of any module, or what it is sure to reach.
        refusal: why it will not be mergeable, else None.
        whole: modules that are trained whole and stored beside the factors.
    """
    ignored = tuple(
        IgnoredKey(name, "full copy of a trained module (modules_to_save); kept in the stored file") for name in whole
    )
    return AdapterManifest(
        format="peft",
        method=method,
        base_model=None,
        base_model_revision=None,
        rank=rank,
        alpha=rank,
        target_modules=(),
        parameter_count=0,
        dtype="F32",
        files=(),
        modules=tuple(modules),
        mergeable=refusal is None,
        refusal=refusal,
        weights_digest="",
        identity_digest="",
        config=dict(config),
        report=IntakeReport(
            used_keys=0,
            ignored=ignored,
            facts=facts_of(modules, method, () if refusal is None else (refusal,), None),
        ),
    )


def check_engine(manifest: AdapterManifest, engine: Engine, places: Mapping[str, str]) -> None:
    """Refuse what the engine will not load; what can be written so that it does is not in the way.

    Args:
        places: name of a rule → JSON pointer of what in the request is the cause; of the others it is `POINTER`.

    Raises:
        RequestInvalid: a finding for every rule that refuses, with the rule's source.
    """
    refused = [found for found in findings(manifest, engine) if found.level != "needs" and found.rule not in UNEVEN]
    if refused:
        refuse(engine, refused, places)


def refuse(engine: Engine, found: Sequence[Finding], places: Mapping[str, str]) -> None:
    """Raise RequestInvalid with these findings, which are none that `engine` could be served in spite of."""
    raise RequestInvalid(
        f"{engine} would not load the result: {found[0].message}.",
        hint="Leave target_engine out to have it all the same; docs/how-to/download.md has the rules of every engine.",
        errors=[
            FieldError(places.get(item.rule, POINTER), f"{item.message} (rule {item.rule}, {item.source})")
            for item in found
        ],
    )


def told(manifest: AdapterManifest, engine: Engine, adapted: Sequence[str] = ()) -> dict[str, Any]:
    """`target_engine` of a job's report: whether the engine loads it, what was adapted, what is left to do."""
    found = findings(manifest, engine)
    return {
        "engine": engine,
        "loads": loads(found),
        "adapted": list(adapted),
        "findings": [asdict(item) for item in found],
    }
