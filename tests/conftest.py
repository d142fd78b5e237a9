"""What every test gets: no network beyond this machine, no settings of the caller, the same seeds."""

from __future__ import annotations

import gc
import ipaddress
import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

# Before any library reads them, and inherited by every child process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
os.environ.update(TOKENIZERS_PARALLELISM="false", TERM="dumb", COLUMNS="200", NO_COLOR="1")
# The cache of converted models says where, not what: the caller may move it.
for _name in [name for name in os.environ if name.startswith("RANKWISE_") and name != "RANKWISE_MODEL_CACHE"]:
    del os.environ[_name]

SEED = 20240916
LOCAL_NAMES = {"localhost", "localhost.localdomain", "", "0.0.0.0", "::", socket.gethostname()}


class NetworkBlockedError(RuntimeError):
    """A test tried to reach another machine."""


def _is_local(host: object) -> bool:
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in LOCAL_NAMES or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        return False


def _check(host: object) -> None:
    if not _is_local(host):
        raise NetworkBlockedError(f"tests may not reach {host!r}; only this machine's loopback is open")


@pytest.fixture(scope="module", autouse=True)
def imported_once() -> None:
    """Hide what lives on, modules above all, from the garbage collector, as the processes of the service do. Each full
    collection, which trainings and transfers ask for, would else go through a million objects of the libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def only_loopback() -> Iterator[None]:
    """Refuse connections and name look-ups that leave the machine; UNIX sockets stay open."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            _check(address[0])
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if self.family in {socket.AF_INET, socket.AF_INET6}:
            _check(address[0])
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        _check(host)
        return lookup(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """What a test makes of structlog for its process, a server say, ends with it."""
    structlog = sys.modules.get("structlog")
    before = structlog.get_config() if structlog else None
    yield
    if before is not None:
        sys.modules["structlog"].configure(**before)
    elif "structlog" in sys.modules:
        sys.modules["structlog"].reset_defaults()


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers in every run and in every order; libraries that are not loaded are not loaded for it."""
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)
