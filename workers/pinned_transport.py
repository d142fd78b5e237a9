"""An HTTP transport that resolves a name once, checks the address, and connects to that very address.

Whoever checks a name and lets the HTTP library resolve it again can be led to another address in between (DNS
rebinding). Here the request goes to the checked address, with the name in the Host header and in TLS.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import os
import socket
import ssl
import threading
from collections.abc import Sequence
from contextlib import suppress

import httpx

from workers.egress import EgressPolicy, Resolver

MAX_ADDRESSES = 4
"""How many addresses of a name are tried, until one takes the connection."""
_AUTHORITIES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def resolve(name: str, port: int) -> list[str]:
    """The addresses of `name` as this machine's resolver gives them, each once."""
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def tls_context() -> ssl.SSLContext:
    """Checks names against the usual authorities, or those of the environment."""
    return _tls_context(*map(os.environ.get, _AUTHORITIES))


@functools.lru_cache(maxsize=4)
def _tls_context(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    """Reading the authorities takes some 20 ms."""
    return httpx.create_ssl_context()


class PinnedTransport(httpx.AsyncBaseTransport):
    """Sends over new connections only: a kept one could be another name's at the same address.

    Raises, while it handles a request:
        RequestInvalid: the policy refuses the URL or every address of its name.
        httpx.ConnectError: the name has no address, or none of them takes the connection.
    """

    def __init__(self, policy: EgressPolicy, tls: ssl.SSLContext, resolver: Resolver = resolve) -> None:
        self._policy = policy
        self._resolver = resolver
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._inner = httpx.AsyncHTTPTransport(verify=tls, limits=limits, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = self._policy.check_url(str(request.url))
        name = url.raw_host.decode("ascii")
        addresses = await self._allowed(name, url.port or (443 if url.scheme == "https" else 80))
        request.extensions = {**request.extensions, "sni_hostname": name.rstrip(".")}
        for last, address in [(address == addresses[-1], address) for address in addresses]:
            request.url = url.copy_with(host=address)
            try:
                return await self._inner.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if last:
                    raise
        raise AssertionError("a name has at least one address")

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _allowed(self, name: str, port: int) -> list[str]:
        """The addresses that may be connected to; never none."""
        found = [name] if _is_address(name) else await self._resolve(name, port)
        if not found:
            raise httpx.ConnectError(f"the name {name} has no address")
        allowed = [address for address in found if self._policy.refusal(address) is None]
        if not allowed:
            self._policy.check_address(found[0])
        return allowed[:MAX_ADDRESSES]

    async def _resolve(self, name: str, port: int) -> Sequence[str]:
        """Ask the resolver in a thread of its own, which nobody waits for: one that hangs holds nothing up."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[str]] = loop.create_future()

        def settle(found: Sequence[str] | Exception) -> None:
            if answer.done():
                return
            if isinstance(found, Exception):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        def ask() -> None:
            found: Sequence[str] | Exception
            try:
                found = self._resolver(name, port)
            except Exception as error:
                found = error
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody wants the answer any more
                loop.call_soon_threadsafe(settle, found)

        threading.Thread(target=ask, name=f"resolve {name[:60]}", daemon=True).start()
        try:
            return await answer
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"the name {name} can not be resolved: {error}") from error


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
