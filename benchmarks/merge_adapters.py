"""What benchmarks of merges share: synthetic adapters, the floor of a plain read and write, one merge in a process.

    python -m benchmarks.merge_adapters METHOD '{"rank": 16}' OUT INPUT …

runs one merge and prints its seconds, its peak memory and that of the idle worker before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WEIGHTS = "adapter_model.safetensors"


def shapes(layers: int) -> Iterator[tuple[str, int, int]]:
    """(path, d_out, d_in) of the linear modules of Llama-2-7B."""
    for layer in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{layer}.self_attn.{name}", 4096, 4096
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{layer}.mlp.{name}", 11008, 4096
        yield f"model.layers.{layer}.mlp.down_proj", 4096, 11008


def make_adapters(
    directory: Path, count: int, rank: int, modules: Sequence[tuple[str, int, int]], dtype: str = "bfloat16"
) -> list[Path]:
    """PEFT directories with random factors."""
    import torch
    from safetensors.torch import save_file

    paths = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, d_out, d_in in modules:
            A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            B = torch.randn(d_out, rank, generator=generator) * 0.01
            tensors[f"base_model.model.{path}.lora_A.weight"] = A.to(getattr(torch, dtype))
            tensors[f"base_model.model.{path}.lora_B.weight"] = B.to(getattr(torch, dtype))
        target = directory / f"adapter-{seed}"
        target.mkdir(parents=True)
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "base_model_name_or_path": "llama-2-7b",
            "target_modules": sorted({path.rsplit(".", 1)[-1] for path, _, _ in modules}),
        }
        (target / "adapter_config.json").write_text(json.dumps(config))
        paths.append(target)
    return paths


def floor(inputs: Sequence[Path], output_bytes: int, scratch: Path) -> float:
    """Seconds to read all inputs and write the output, plainly."""
    content = os.urandom(1 << 20) * (output_bytes // (1 << 20) + 1)
    started = time.perf_counter()
    for path in inputs:
        (path / WEIGHTS).read_bytes()
    (scratch / "floor.bin").write_bytes(memoryview(content)[:output_bytes])
    return time.perf_counter() - started


def cold_floor(inputs: Sequence[Path], output_bytes: int, scratch: Path) -> float:
    """As `floor`, when nothing of the inputs is in the page cache, and until the output is on the disk."""
    content = os.urandom(1 << 20) * (output_bytes // (1 << 20) + 1)
    for path in inputs:
        with (path / WEIGHTS).open("rb") as file:
            # what was not written yet would stay
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    for path in inputs:
        (path / WEIGHTS).read_bytes()
    with (scratch / "cold-floor.bin").open("wb") as file:
        file.write(memoryview(content)[:output_bytes])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def merge_once(inputs: Sequence[Path], method: str, parameters: Mapping[str, Any], out: Path) -> dict[str, float]:
    """One merge in a new process: seconds from files to file, peak memory, and that of the idle worker before it.

    The description of each input is there before, as a service has it since the upload; the merge opens the files.
    """
    command = [sys.executable, "-m", "benchmarks.merge_adapters", method, json.dumps(dict(parameters)), str(out)]
    run = subprocess.run([*command, *map(str, inputs)], check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(run.stdout)
    return result


def peak_memory_kb() -> int:
    """High-water mark of this process's memory. (getrusage would carry over that of the process that started it.)"""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def main(method: str, parameters: str, out: str, *inputs: str) -> None:
    from artifacts.adapter import Adapter
    from artifacts.base_model import BaseModelRef
    from merge.catalog import METHODS as MENU
    from merge.catalog import parse_parameters
    from merge.compiling import compile_loops
    from merge.engine import merge_files
    from merge.plan import MergeInput

    # A worker serves many merges: its compiled loops and kernels are there already.
    MENU[method].load()
    compile_loops()
    described = [
        (
            MergeInput(
                id=path.name,
                name=path.name,
                digest=path.name,
                modules=tuple(Adapter.open(path).modules.values()),
                method="lora",
                mergeable=True,
                refusal=None,
                base=BaseModelRef.named("llama-2-7b"),
            ),
            path,
        )
        for path in map(Path, inputs)
    ]
    idle = peak_memory_kb()
    started, cpu_started = time.perf_counter(), time.process_time()
    report = merge_files(described, method, parse_parameters(method, json.loads(parameters)), Path(out))
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "idle_kb": idle, "peak_kb": peak_memory_kb()}
    error = report.totals()["relative_error"]
    print(json.dumps({**figures, "relative_error": error}))


if __name__ == "__main__":
    main(*sys.argv[1:])
