"""The mark of an adapter whose first components are adapters of smaller rank (DyLoRA, arXiv:2210.07558).

Of such an adapter of rank r, the first b rows of every lora_A and the first b columns of every lora_B are the adapter
of rank b, for every rank b that was trained. The mark stands in the metadata of the safetensors file, which PEFT does
not look at: it goes wherever the file goes, and what a merge or another program writes does not have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, get_args

from artifacts.errors import ConfigRefused, FileBroken
from artifacts.layout import AdapterLayout, parse_json
from artifacts.manifest import NestedRanks, ScaleMode
from artifacts.peft_config import MAX_RANK

NESTED_KEY = "rankwise_dylora"
"""The key of the mark in the file's metadata."""
METHOD = "dylora"


def mark_of(nested: NestedRanks) -> str:
    """The text of the mark."""
    return json.dumps({"ranks": list(nested.ranks), "scale_mode": nested.scale_mode}, separators=(",", ":"))


def nested_ranks(layout: AdapterLayout) -> NestedRanks | None:
    """What the mark of a file says; None if it has none.

    Raises:
        FileBroken: the mark can not be read, or the adapter is none of which the first components could be used.
    """
    text = layout.header.metadata.get(NESTED_KEY)
    if text is None:
        return None
    nested = _parse(text)
    for problem in _problems(layout, nested):
        raise _broken(problem)
    return nested


def _parse(text: str) -> NestedRanks:
    try:
        document: dict[str, Any] = parse_json(text, NESTED_KEY)
    except ConfigRefused as error:
        raise _broken(error.detail.rstrip(".")) from error
    if document.keys() != {"ranks", "scale_mode"}:
        raise _broken("it needs exactly the fields ranks and scale_mode")
    ranks, mode = document["ranks"], document["scale_mode"]
    if not isinstance(ranks, list) or not ranks or not all(map(_is_rank, ranks)):
        raise _broken(f"ranks must be a list of integers from 1 to {MAX_RANK}")
    if any(first >= second for first, second in pairwise(ranks)):
        raise _broken("ranks must rise")
    if mode not in get_args(ScaleMode):
        raise _broken(f"scale_mode must be one of {', '.join(get_args(ScaleMode))}")
    return NestedRanks(tuple(ranks), mode)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def _problems(layout: AdapterLayout, nested: NestedRanks) -> Iterator[str]:
    config, rank = layout.config, nested.ranks[-1]
    if len(layout.configs) > 1 or config.method != "lora" or config.opaque:
        yield "only a plain LoRA of one model can be cut to smaller ranks"
    if config.rank_pattern or config.alpha_pattern or config.lora_bias:
        yield "rank_pattern, alpha_pattern and lora_bias can not be cut to smaller ranks"
    if config.rank != rank:
        yield f"its largest rank is {rank}, and r in the configuration is {config.rank}"
    for module in layout.modules:
        if module.rank != rank or module.kind != "linear":
            yield f"its largest rank is {rank}, and {module.path!r} is a {module.kind} module of rank {module.rank}"


def _broken(problem: str) -> FileBroken:
    return FileBroken(
        f"The metadata {NESTED_KEY!r} says that the adapter can be cut to smaller ranks, but {problem}.",
        hint=f"If the weights were changed since they were trained, save them without {NESTED_KEY!r}.",
    )
