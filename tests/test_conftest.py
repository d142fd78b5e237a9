"""The guard itself: a test that reaches out fails, one that talks to this machine does not."""

from __future__ import annotations

import random
import socket

import pytest


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_other_machines_are_out_of_reach(address: tuple[str, int]) -> None:
    with socket.socket() as client, pytest.raises(RuntimeError, match="only this machine's loopback"):
        client.connect(address)
    with socket.socket() as client, pytest.raises(RuntimeError, match="only this machine's loopback"):
        client.connect_ex(address)


def test_names_are_not_looked_up_elsewhere() -> None:
    with pytest.raises(RuntimeError, match=r"pypi\.org"):
        socket.create_connection(("pypi.org", 443), timeout=1)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port), timeout=5) as client:
            assert client.getpeername()[1] == port


def test_seeds_are_fixed() -> None:
    assert random.random() == random.Random(20240916).random()
