"""Files written tensor by tensor are read by the reference library."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from artifacts.adapter import TORCH_DTYPES
from artifacts.errors import DiskFull
from artifacts.safetensors_header import read_header
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from(sorted(TORCH_DTYPES))


def values(entry: TensorEntry, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if entry.dtype == "BOOL" else 60, (entry.size,), generator=generator, dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda t: t != "__metadata__"), st.tuples(dtypes, shapes), max_size=6
    ),
    backwards=st.booleans(),
)
def test_any_tensors_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, tuple[int, ...]]], backwards: bool
) -> None:
    path = tmp_path_factory.mktemp("writer") / "x.safetensors"
    entries = [TensorEntry(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    expected = {entry.name: values(entry, i) for i, entry in enumerate(entries)}
    with SafetensorsWriter(path, entries, {"format": "pt", "note": "ä"}) as writer:
        for name in sorted(expected, reverse=backwards):
            writer.write(name, expected[name])
    loaded = load_file(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].view(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert dict(read_header(path).metadata) == {"format": "pt", "note": "ä"}
    with safe_open(path, "pt") as file:
        assert file.metadata()["note"] == "ä"


def entry(name: str = "a", shape: tuple[int, ...] = (2, 3)) -> TensorEntry:
    return TensorEntry(name, "F32", shape)


class TestNothingAppearsUnfinished:
    def test_a_tensor_is_missing(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ValueError, match="1 tensors were never written, the first is b"),
            SafetensorsWriter(tmp_path / "x", [entry("a"), entry("b")], {}) as writer,
        ):
            writer.write("a", torch.zeros(2, 3))
        assert not list(tmp_path.iterdir())

    def test_an_error_inside(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="inside"), SafetensorsWriter(tmp_path / "x", [entry()], {}):
            assert [path.name for path in tmp_path.iterdir()] == ["x.partial"]
            raise RuntimeError("inside")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("tensor", [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)])
    def test_another_shape_or_dtype(self, tmp_path: Path, tensor: torch.Tensor) -> None:
        with (
            pytest.raises(ValueError, match="was announced as F32"),
            SafetensorsWriter(tmp_path / "x", [entry()], {}) as writer,
        ):
            writer.write("a", tensor)
        assert not list(tmp_path.iterdir())

    def test_the_same_name_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="same name"):
            SafetensorsWriter(tmp_path / "x", [entry(), entry()], {})


def test_a_full_disk_is_found_before_the_work(tmp_path: Path) -> None:
    """In a process of its own, since the limit on file sizes holds for all of its files."""
    code = """
import resource, signal, sys
from pathlib import Path
from artifacts.errors import DiskFull
from artifacts.safetensors_writer import SafetensorsWriter, TensorEntry
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    SafetensorsWriter(Path(sys.argv[1]), [TensorEntry("a", "F32", (1024, 1024))], {})
except DiskFull as error:
    print(error.detail)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.safetensors")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert "There is no space for x.safetensors" in run.stdout
    assert not list(tmp_path.iterdir())
    assert DiskFull.status == 507
