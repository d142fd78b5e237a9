"""How much main memory jobs can have, as far as this server knows."""

from __future__ import annotations

import socket

import psutil
from sqlalchemy.orm import Session

from app.service_state import alive_servers
from app.settings import Settings


def memory_of_all(settings: Settings, session: Session) -> int | None:
    """The main memory, if every slot that is alive is a CPU of this machine; else nobody here knows."""
    slots = [
        (str(slot.get("host") or server.host), slot.get("device"))
        for server in alive_servers(session, settings)
        for slot in server.slots
    ]
    here = socket.gethostname()
    if not slots or any(host != here or device != "cpu" for host, device in slots):
        return None
    return int(psutil.virtual_memory().total)
