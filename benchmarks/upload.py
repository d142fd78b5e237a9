"""Upload of a 640 MB adapter over HTTP, against `cp` + `sha256sum` of the same file.

A real server on loopback; a client that only moves bytes (`sendfile`). Each round changes a few bytes of the file, so
that it is new to the server, and times copy, hash and upload one after another. Goals: throughput at least half of
`cp` + `sha256sum`, and a memory growth of the server below 64 MB.

    python benchmarks/upload.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
LAYERS = 32
# Linear modules of Llama-2-7B: name → (d_out, d_in).
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}
RANK = 128  # 224 modules at this rank are 640 MB in bf16
GOAL_RATIO, GOAL_GROWTH_MB = 0.5, 64.0


@dataclass(frozen=True)
class Round:
    """Seconds and what the server answered."""

    copy_seconds: float
    hash_seconds: float
    upload_seconds: float
    status: int
    growth_mb: float

    @property
    def ratio(self) -> float:
        """Throughput of the upload over that of copy + hash: 1 is as fast as them."""
        return (self.copy_seconds + self.hash_seconds) / self.upload_seconds


def write_adapter(path: Path, rank: int) -> bytes:
    """A PEFT weights file of random bf16 numbers below 2 in magnitude; returns its adapter_config.json."""
    tensors: dict[str, list[int]] = {}
    for layer in range(LAYERS):
        for name, (d_out, d_in) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = [rank, d_in]
            tensors[f"{prefix}.lora_B.weight"] = [d_out, rank]
    header: dict[str, Any] = {}
    position = 0
    for key, shape in tensors.items():
        size = 2 * shape[0] * shape[1]
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Clearing bit 6 of each high byte keeps every exponent below that of 2.0: no NaN, no Inf.
    table = bytes(range(256))
    high = bytes(value & 0xBF for value in table)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = position
        while left:
            block = bytearray(os.urandom(min(left, 8 << 20)))
            block[1::2] = bytes(block[1::2]).translate(high)
            file.write(block)
            left -= len(block)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(name.split(".")[1] for name in SHAPES),
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
    }
    return json.dumps(config).encode()


def touch_content(path: Path) -> None:
    """Make the file new to the server: other mantissas in its last 16 elements."""
    with path.open("r+b") as file:
        file.seek(-32, os.SEEK_END)
        block = bytearray(file.read(32))
        block[0::2] = os.urandom(16)
        file.seek(-32, os.SEEK_END)
        file.write(block)


@contextmanager
def served(data_dir: Path) -> Iterator[tuple[int, psutil.Process]]:
    """A server on a free port of loopback, without a pool."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"RANKWISE_DATA_DIR": str(data_dir), "RANKWISE_POOL": "off", "RANKWISE_LOG_LEVEL": "error"}
    command = [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port)]
    command += ["--http", "httptools", "--loop", "uvloop", "--no-access-log", "--log-level", "error"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings})
    try:
        wait_for(port, process)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("the server does not answer")


def upload(port: int, weights: Path, config: bytes) -> tuple[float, int]:
    """Seconds from the first byte sent to the last byte of the answer, and its status."""
    boundary = uuid.uuid4().hex
    line = 'Content-Disposition: form-data; name="file"; filename="{}"\r\n\r\n'
    head = f"--{boundary}\r\n{line.format('adapter_config.json')}".encode() + config
    head += f"\r\n--{boundary}\r\n{line.format('adapter_model.safetensors')}".encode()
    tail = f"\r\n--{boundary}--\r\n".encode()
    length = len(head) + weights.stat().st_size + len(tail)
    request = (
        f"POST /adapters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n"
        f"Content-Type: multipart/form-data; boundary={boundary}\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port)) as connection, weights.open("rb") as file:
        started = time.perf_counter()
        connection.sendall(request.encode() + head)
        connection.sendfile(file)
        connection.sendall(tail)
        answer = b""
        while chunk := connection.recv(1 << 16):
            answer += chunk
        return time.perf_counter() - started, int(answer.split(b" ", 2)[1])


def peak_rss(process: psutil.Process) -> float:
    """The largest resident size since `reset_peak`, in MB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmHWM in /proc: this benchmark needs Linux")


def reset_peak(process: psutil.Process) -> None:
    """Start the kernel's high-water mark again from the present size."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def run_round(port: int, process: psutil.Process, weights: Path, config: bytes) -> Round:
    """Copy, hash and upload the same new content."""
    touch_content(weights)
    os.sync()  # no round pays for the writes of the one before
    copy = weights.with_suffix(".copy")
    copy_seconds = timed(["cp", str(weights), str(copy)])
    hash_seconds = timed(["sha256sum", str(copy)])
    copy.unlink()
    os.sync()
    reset_peak(process)
    before = process.memory_info().rss / 2**20
    seconds, status = upload(port, weights, config)
    return Round(copy_seconds, hash_seconds, seconds, status, peak_rss(process) - before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=RANK, help="128 gives 640 MB")
    parser.add_argument("--dir", type=Path, default=None, help="scratch folder; default: the system's")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "upload.json")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rankwise-upload-", dir=arguments.dir))
    try:
        weights, small = folder / "adapter_model.safetensors", folder / "small.safetensors"
        config = write_adapter(weights, arguments.rank)
        small_config = write_adapter(small, 1)
        with served(folder / "data") as (port, process):
            upload(port, small, small_config)  # loads what the first upload of a server loads
            rounds = [run_round(port, process, weights, config) for _ in range(arguments.rounds)]
        size = weights.stat().st_size
    finally:
        shutil.rmtree(folder)
    return report(rounds, size, arguments.out)


def report(rounds: list[Round], size: int, out: Path) -> int:
    """Print the table, write the JSON; 0 when both goals are met."""
    print(f"{size / 1e6:.0f} MB; seconds")
    print(f"{'cp':>8} {'sha256sum':>10} {'upload':>8} {'ratio':>7} {'growth MB':>10}  status")
    for item in rounds:
        print(
            f"{item.copy_seconds:8.2f} {item.hash_seconds:10.2f} {item.upload_seconds:8.2f} {item.ratio:7.2f} "
            f"{item.growth_mb:10.1f}  {item.status}"
        )
    ratio = statistics.median(item.ratio for item in rounds)
    growth = max(item.growth_mb for item in rounds)
    met = ratio >= GOAL_RATIO and growth < GOAL_GROWTH_MB and all(item.status == 201 for item in rounds)
    print(
        f"median ratio {ratio:.2f} (goal >= {GOAL_RATIO}), largest growth {growth:.1f} MB (goal < {GOAL_GROWTH_MB:g})"
    )
    print("goals met" if met else "GOALS MISSED")
    document = {
        "benchmark": "upload",
        "bytes": size,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "rounds": [asdict(item) | {"ratio": item.ratio} for item in rounds],
        "median_ratio": ratio,
        "largest_growth_mb": growth,
        "goals": {"ratio": GOAL_RATIO, "growth_mb": GOAL_GROWTH_MB},
        "met": met,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
