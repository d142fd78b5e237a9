"""The command line `rankwise`. Every command talks HTTP to a running service, except those that start or set one up."""

from __future__ import annotations

from app.cli.program import main, run

__all__ = ["main", "run"]
