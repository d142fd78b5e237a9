"""`python -m app.cli`: the same program as the installed script."""

from __future__ import annotations

from app.cli import main

main()
