"""`rankwise` itself, with the kinds of the chaos rounds beside its own: `chaos_server.py serve` or `… worker`."""

from __future__ import annotations

from chaos_kinds import KINDS as CHAOS_KINDS  # it also makes this process follow the shifted clock

from app.cli import main
from workers import supervisor

if __name__ == "__main__":
    supervisor.KINDS = {**supervisor.KINDS, **CHAOS_KINDS}
    main()
