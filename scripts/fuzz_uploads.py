"""Hostile uploads without end: all of it is understood, or refused by our error, soon and in bounded memory.

    nice -n 15 python -m scripts.fuzz_uploads --minutes 20

Good files of every kind are damaged, byte by byte or name by name, and taken in as an upload is. An input that brings
the reader down, takes long, or is accepted although its factors can not be read, is kept in the folder `--keep` under
the number that makes it again (`--only`).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from artifacts.errors import RankwiseError
from artifacts.gguf_file import gguf_head, padding
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.layout import CONFIG_NAME, WEIGHTS_NAME, understand
from artifacts.pair_numbers import factors
from artifacts.safetensors_header import packed_header, read_header
from scripts.formats_report import CorpusValues, document_of, header_of, layouts

Random = random.Random
Files = dict[str, bytes]

MEMORY_BYTES = 3 * 1024**3
"""Address space of the process: what would take more fails, and is found."""
SLOW_SECONDS = 10.0
_LIMITS = IntakeLimits(max_bytes=64 * 1024**2, max_entries=50)
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "architectures": ["LlamaForCausalLM"]}
_NUMBERS = (0, 1, 2, 3, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2**63,
    1e308,
    -0.0,
    "",
    "a" * 300,
    "(a+)+$",
    [],
    {},
    [[]],
    "\0",
)


def safetensors_file(draw: Random, prefix: str = "base_model.model.model.layers.0.self_attn.q_proj") -> bytes:
    """One low-rank pair."""
    dtype, width = draw.choice([("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8)])
    rank, d_in, d_out = 2, draw.randint(1, 4), draw.randint(1, 4)
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw.random() < 0.5 else {}
    at = 0
    for name, shape in ((f"{prefix}.lora_A.weight", (rank, d_in)), (f"{prefix}.lora_B.weight", (d_out, rank))):
        size = shape[0] * shape[1] * width
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return packed_header(document) + draw.randbytes(at)


def gguf_file(draw: Random) -> bytes:
    """Two pairs, of which one has rows that change places."""
    entries, body = [], b""
    for stem in ("blk.0.attn_q", "blk.1.ffn_down", "token_embd"):
        kind, width = draw.choice([("F32", 4), ("F16", 2), ("BF16", 2)])
        rank = draw.randint(1, 4)
        for end, shape in (("a", (rank, 4)), ("b", (8, rank))):
            turned = (stem, end) == ("token_embd", "a")
            entries.append((f"{stem}.weight.lora_{end}", kind, shape[::-1] if turned else shape))
            size = shape[0] * shape[1] * width
            body += draw.randbytes(size) + padding(size)
    values: dict[str, str | float] = {
        "general.architecture": draw.choice(["llama", "qwen2", "gemma3"]),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": draw.choice([0.0, 4.0, 4.0, 4.0, -1.0, float("nan")]),
    }
    return gguf_head(values, entries) + body


def archive(draw: Random, files: Files) -> bytes:
    """The files as zip, tar or tar.gz."""
    out = io.BytesIO()
    folder, kind = draw.choice(["", "", "", "a/", "../", "/", "b" * 120 + "/"]), draw.choice(["zip", "tar", "tar.gz"])
    if kind == "zip":
        with zipfile.ZipFile(out, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as packed:
            for name, content in files.items():
                packed.writestr(zipfile.ZipInfo(folder + name), content)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w", format=draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(content)
            info.type = draw.choice([tarfile.REGTYPE] * 12 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
            info.linkname = "/etc/passwd" if info.type != tarfile.REGTYPE else ""
            tar.addfile(info, io.BytesIO(content))
    return gzip.compress(out.getvalue(), mtime=0) if kind == "tar.gz" else out.getvalue()


def damaged(draw: Random, content: bytes) -> bytes:
    """A few bytes changed, numbers set to borders, parts cut out, doubled or exchanged."""
    data = bytearray(content)
    for _ in range(draw.choice([0, 0, 0, 1, 1, 2, 3, 8])):
        if len(data) < 16:
            break
        at, length = draw.randrange(len(data) - 8), draw.choice([1, 2, 4, 8])
        match draw.randrange(6):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                data[at : at + length] = draw.choice(_NUMBERS).to_bytes(8, "little")[:length]
            case 2:
                del data[at : at + draw.choice([1, 8, 100])]
            case 3:
                data[at:at] = data[at : at + draw.choice([1, 8, 100])]
            case 4:
                data[at : at + length] = draw.randbytes(length)
            case 5:
                del data[at:]
    return bytes(data)


def damaged_json(draw: Random, document: dict[str, Any]) -> bytes:
    """Fields with values that they never have."""
    changed = dict(document)
    for _ in range(draw.choice([0, 1, 2])):
        changed[
            draw.choice([*document, "rank_pattern", "alpha_pattern", "use_dora", "bias", "layers_to_transform"])
        ] = draw.choice(_VALUES)
    return json.dumps(changed).encode()


def header_input(draw: Random) -> Files:
    return {"x.safetensors": damaged(draw, safetensors_file(draw, "unet.some.proj"))}


def directory_input(draw: Random) -> Files:
    weights = safetensors_file(draw)
    return {WEIGHTS_NAME: damaged(draw, weights), CONFIG_NAME: damaged_json(draw, _CONFIG)}


def archive_input(draw: Random) -> Files:
    files = {WEIGHTS_NAME: safetensors_file(draw), CONFIG_NAME: damaged_json(draw, _CONFIG)}
    if draw.random() < 0.3:
        files["adapter_model.bin"] = b"\x80\x02."
    return {"x.bin": damaged(draw, archive(draw, files))}


def gguf_input(draw: Random) -> Files:
    content = damaged(draw, gguf_file(draw))
    return (
        {"x.gguf": content} if draw.random() < 0.2 else {"x.gguf": content, "config.json": damaged_json(draw, _HEADS)}
    )


def keys_input(draw: Random, known: list[dict[str, Any]]) -> dict[str, Any]:
    """A layout of the corpus with names and shapes changed, or mixed with another."""
    layout = draw.choice(known)
    items = sorted(layout["tensors"].items())
    start = draw.randrange(len(items)) // 12 * 12  # factors come in twos, threes and fours
    tensors = dict(items[start : start + 12 * draw.randint(1, 4)])
    if draw.random() < 0.15:
        tensors |= dict(
            draw.sample(list((other := draw.choice(known))["tensors"].items()), min(4, len(other["tensors"])))
        )
    for key in draw.sample(list(tensors), min(len(tensors), draw.choice([0, 0, 1, 2]))):
        dtype, shape = tensors.pop(key)
        words = key.split(".")
        match draw.randrange(6):
            case 0:
                words[draw.randrange(len(words))] = draw.choice(["", "lora_A", "alpha", "0", "weight", "é", "module"])
            case 1:
                words.insert(draw.randrange(len(words)), draw.choice(words))
            case 2:
                words.pop(draw.randrange(len(words)))
            case 3:
                shape = [draw.choice([0, 1, 2, 4, 320, 1280, 2**31]) for _ in range(draw.randrange(6))]
            case 4:
                dtype = draw.choice(["F32", "BF16", "I64", "U8", "F8_E4M3"])
            case 5:
                continue
        tensors[".".join(words)] = [dtype, shape]
    values = {key: draw.choice([0.0, 1.0, -2.0, float("nan"), float("inf")]) for key in tensors if "alpha" in key}
    return {**layout, "tensors": tensors, "values": values}


def check_files(files: Files) -> str:
    """Take the files in as an upload; what is accepted can be read."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        sent = []
        for number, (name, content) in enumerate(files.items()):
            (folder / str(number)).write_bytes(content)
            sent.append((name, folder / str(number)))
        directory = receive(sent, folder / "work", _LIMITS)
        manifest = inspect(directory)
        weights = directory / WEIGHTS_NAME
        infos, raw = read_header(weights).tensors, weights.read_bytes()
        for module in manifest.modules:
            if module.block_key is None:
                a, b = factors(module, lambda key: (infos[key], raw[infos[key].begin : infos[key].end]))
                assert (a.shape, b.shape) == ((module.rank, module.d_in), (module.d_out, module.rank)), module
        inside = folder.resolve()
        assert all(path.resolve().is_relative_to(inside) for path in folder.rglob("*")), "a path outside of the folder"
    finally:
        shutil.rmtree(folder)
    return "accepted" if manifest.mergeable else "kept"


def check_keys(layout: dict[str, Any]) -> str:
    """Understand a header; every key has its verdict."""
    header = header_of(layout)
    found = understand(header, CorpusValues(layout), document_of(layout), Path("weights"), Path(CONFIG_NAME))
    assert [item.key for item in found.verdicts] == list(layout["tensors"]), "a key has no verdict"
    assert found.modules or found.reading is None or found.reading.typed, "nothing was understood, and nobody said so"
    return "kept" if found.refusals else "accepted"


def targets() -> dict[str, Callable[[Random], tuple[Any, Callable[[], str]]]]:
    """Name → what makes an input of a target, and what checks it."""
    known = [layout for layout in layouts().values() if layout["tensors"]]

    def of_files(make: Callable[[Random], Files]) -> Callable[[Random], tuple[Any, Callable[[], str]]]:
        def target(draw: Random) -> tuple[Any, Callable[[], str]]:
            files = make(draw)
            return files, lambda: check_files(files)

        return target

    def of_keys(draw: Random) -> tuple[Any, Callable[[], str]]:
        layout = keys_input(draw, known)
        return layout, lambda: check_keys(layout)

    made = {"header": header_input, "directory": directory_input, "archive": archive_input, "gguf": gguf_input}
    return {**{name: of_files(make) for name, make in made.items()}, "keys": of_keys}


def numbers(minutes: float, inputs: int, first: int) -> Iterator[int]:
    end, number = time.monotonic() + 60 * minutes, first
    while (number < first + inputs) if inputs else (time.monotonic() < end):
        yield number
        number += 1


@contextmanager
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(minutes: float, inputs: int, first: int, keep: Path | None) -> tuple[Counter[str], list[str]]:
    """Run all targets in turn. Returns counts by target and outcome, and what was found."""
    counts: Counter[str] = Counter()
    found: list[str] = []
    all_targets = targets()
    for number in numbers(minutes, inputs, first):
        name = list(all_targets)[number % len(all_targets)]
        content, check = all_targets[name](Random(number))
        start, fault = time.monotonic(), ""
        try:
            counts[f"{name} {check()}"] += 1
        except RankwiseError as error:
            counts[f"{name} refused"] += 1
            fault = "" if error.detail else "refused without a reason"
        except Exception:  # what is looked for
            fault = traceback.format_exc(limit=-4)
        if time.monotonic() - start > SLOW_SECONDS:
            fault += f"\ntook {time.monotonic() - start:.0f} s"
        if fault:
            counts[f"{name} FOUND"] += 1
            found.append(f"{name} {number}: {fault}")
            if keep is not None:
                _keep(keep, f"{name}-{number}", content)
    return counts, found


def _keep(folder: Path, name: str, content: Any) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    if all(isinstance(item, bytes) for item in content.values()):
        for file, raw in content.items():
            (folder / name / file).write_bytes(raw)
    else:
        (folder / name / "layout.json").write_text(json.dumps(content))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--inputs", type=int, default=0, help="So many inputs instead of minutes.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first input.")
    parser.add_argument("--only", type=int, help="One input alone.")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-found"), help="Folder for what is found.")
    options = parser.parse_args()
    first, inputs = (options.first, options.inputs) if options.only is None else (options.only, 1)
    with bounded_memory():
        counts, found = fuzz(options.minutes, inputs, first, options.keep)
    for finding in found[:20]:
        sys.stdout.write(finding + "\n")
    for outcome, count in sorted(counts.items()):
        sys.stdout.write(f"{outcome}: {count}\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(f"{counts.total()} inputs, {len(found)} found, peak memory {peak} MB\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
