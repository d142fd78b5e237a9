"""The generator of the reference pages, and the pages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="session")
def pages(generate: ModuleType) -> dict[str, str]:
    """Every page as a reader sees it, by its path below docs/."""
    folder = ROOT / "docs"
    return {
        str(path.relative_to(folder)): generate.fill(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.md"))
    }
