"""Where a user's URL may lead: the rule that keeps it from reaching what only this server can reach."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from artifacts.errors import FieldError, RequestInvalid

if TYPE_CHECKING:
    import httpx

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Sequence[str]]
"""(name, port) → IP addresses, the preferred one first; raises OSError."""

_REFUSED: tuple[tuple[str, str], ...] = (
    # IPv6 addresses that are another spelling of an IPv4 address, which may be one of ours.
    ("::ffff:0:0/96", "an IPv4-mapped address"),
    ("::ffff:0:0:0/96", "an IPv4-translated address"),
    ("64:ff9b::/96", "a NAT64 address"),
    ("64:ff9b:1::/48", "a NAT64 address"),
    ("2002::/16", "a 6to4 address"),
    ("2001::/32", "a Teredo address"),
    ("::/96", "an IPv4-compatible address"),
    ("fec0::/10", "a site-local address"),
    ("5f00::/16", "a segment-routing address"),
    ("3fff::/20", "an address for documentation"),
    ("192.0.0.0/24", "an address for special purposes"),
    ("192.88.99.0/24", "a 6to4 relay"),
    ("100.64.0.0/10", "a carrier-grade NAT address"),
    # Public by its number, but the metadata service of a cloud's own machines.
    ("168.63.129.16/32", "a cloud provider's own address"),
)
_REFUSED_NETWORKS = tuple((ipaddress.ip_network(text), reason) for text, reason in _REFUSED)
_LOOPBACKS = ("127.0.0.1", "::1")
# Resolvers read "127.1", "2130706433" and "0x7f.1" as IPv4 addresses; a name's last label is never a number.
_NAME = re.compile(r"[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_ENDS_IN_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0x[0-9a-f]*)$")


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """Which URLs and addresses are allowed; by default https to public addresses.

    Args:
        allow_http: whether `http` is allowed beside `https`.
        allowed_networks: addresses that are allowed although they are not public.
        settings: the environment variables that say both, without their ends `_ALLOW_HTTP` and `_ALLOWED_NETWORKS`.
        instead: what there is in the place of a user name and password.
    """

    allow_http: bool = False
    allowed_networks: tuple[Network, ...] = ()
    settings: str = "RANKWISE_WEBHOOK"
    instead: str = "Every message is signed; check that instead."

    @classmethod
    def everywhere(cls) -> EgressPolicy:
        """For addresses that the operator has named."""
        return cls(allow_http=True, allowed_networks=(ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")))

    def check_url(self, url: str) -> httpx.URL:
        """The parsed URL. A name in it is not resolved: its address is checked when something is sent.

        Raises:
            RequestInvalid: another scheme, credentials or a fragment, no host, or an address that is not allowed.
        """
        # Here and not at the top: a server that has no webhooks does without an HTTP client.
        import httpx

        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise _refused(f"can not be read: {error}") from error
        schemes = ("https", "http") if self.allow_http else ("https",)
        if parsed.scheme not in schemes:
            raise _refused(
                f"must begin with {' or '.join(f'{scheme}://' for scheme in schemes)}",
                hint=None
                if parsed.scheme != "http"
                else f"Whoever runs the service can set {self.settings}_ALLOW_HTTP.",
            )
        if parsed.userinfo:
            raise _refused("must not hold a user name or password", hint=self.instead)
        if parsed.fragment:
            raise _refused("must not have a fragment (#…)")
        if parsed.port is not None and not 1 <= parsed.port <= 65535:
            raise _refused(f"has the port {parsed.port}; there are 1 to 65535")
        self._check_host(parsed.raw_host.decode("ascii").lower().rstrip("."))
        return parsed

    def check_address(self, text: str) -> None:
        """Raises RequestInvalid unless something may be sent to this address."""
        problem = self.refusal(text)
        if problem is not None:
            raise _refused(f"leads to {text}, {problem}", hint=self._hint)

    def refusal(self, text: str) -> str | None:
        """Why nothing may be sent to this IP address; None if it is allowed."""
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            return "an address of one network interface only"
        if any(address in network for network in self.allowed_networks if network.version == address.version):
            return None
        return _why_not_public(address)

    @property
    def _hint(self) -> str:
        return f"Whoever runs the service can allow a network with {self.settings}_ALLOWED_NETWORKS."

    def _check_host(self, host: str) -> None:
        if not host:
            raise _refused("has no host")
        if host == "localhost" or host.endswith(".localhost"):
            if all(self.refusal(address) for address in _LOOPBACKS):
                raise _refused(f"leads to {host}, this server itself", hint=self._hint)
            return
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if not _NAME.fullmatch(host) or _ENDS_IN_NUMBER.search(host):
                raise _refused(f"has the host {host[:100]!r}, neither a name nor a whole IP address") from None
            return
        self.check_address(host)


def _why_not_public(address: Address) -> str | None:
    for network, reason in _REFUSED_NETWORKS:
        if network.version == address.version and address in network:
            return reason
    if address.is_multicast:
        return "a multicast address"
    if address.is_loopback:
        return "a loopback address"
    if address.is_link_local:
        return "a link-local address"
    if address.is_private or address.is_reserved or address.is_unspecified or not address.is_global:
        return "an address that is not public"
    return None


def _refused(problem: str, *, hint: str | None = None) -> RequestInvalid:
    return RequestInvalid(f"the URL {problem}", hint=hint, errors=[FieldError("/url", problem)])
