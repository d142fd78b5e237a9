"""Leading singular vectors of base weights, computed once for every base model and layer and kept in a folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.truncated_svd import truncated_svd


@dataclass(frozen=True, slots=True, eq=False)
class Subspace:
    """W ≈ U·diag(S)·Vᵀ with k singular vectors: U (d_out×k), S (k, descending), V (d_in×k).

    Singular vectors have no sign of their own: here the largest |entry| of every column of U is positive, so that two
    machines, and two runs, say the same.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    def cut(self, rank: int) -> Subspace:
        """The first `rank` vectors."""
        return Subspace(self.U[:, :rank], self.S[:rank], self.V[:, :rank])


def decompose(weight: Tensor, rank: int, path: str) -> Subspace:
    """The leading `rank` singular vectors of a weight, or all if it has fewer.

    Args:
        weight: (d_out, d_in).
        path: of the layer: seeds the random subspace in which very large weights are decomposed.
    """
    seed = int.from_bytes(hashlib.sha256(path.encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    U, S, Vt = truncated_svd(weight.float(), min(rank, *weight.shape), generator)
    largest = U.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(U.gather(0, largest)[0] < 0, -1.0, 1.0)
    return Subspace(U * signs, S, Vt.T * signs)


def similarity(source: Subspace, target: Subspace) -> float | None:
    """Φ = ‖U_sᵀU_t‖²_F/k, 1 for equal column spaces (arXiv:2501.16559); None where the sides differ."""
    if source.U.shape[0] != target.U.shape[0]:
        return None
    return float((source.U.T @ target.U).square().sum()) / min(source.rank, target.rank)


class SubspaceCache:
    """The subspaces of one base model's layers, as files."""

    def __init__(self, folder: Path, identity: str, rank: int) -> None:
        """`identity` is the digest of the base model's weights."""
        self._folder, self._rank = folder / identity[:32], rank

    def add(self, path: str, weight: Tensor) -> None:
        """Decompose and keep a layer's weight, unless that is done. The file appears when it is whole."""
        target = self._file(path)
        if target.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        found = decompose(weight, self._rank, path)
        handle, name = tempfile.mkstemp(dir=self._folder, suffix=".partial")
        os.close(handle)
        try:
            tensors = {"U": found.U.contiguous(), "S": found.S.contiguous(), "V": found.V.contiguous()}
            save_file(tensors, name)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def has(self, path: str) -> bool:
        return self._file(path).exists()

    def get(self, path: str) -> Subspace:
        """What was added."""
        return Subspace(**load_file(self._file(path)))

    def _file(self, path: str) -> Path:
        name = hashlib.sha256(f"{path}:{self._rank}".encode()).hexdigest()[:32]
        return self._folder / f"{name}.safetensors"
