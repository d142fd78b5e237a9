from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import RequestInvalid
from workers.egress import EgressPolicy, Network

DEFAULT = EgressPolicy()
REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "::ffff:0:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::8.8.8.8",
    "64:ff9b:1::a00:1",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]


def network(text: str) -> Network:
    return ipaddress.ip_network(text)


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", REFUSED)
def test_addresses_that_only_this_server_should_reach_are_refused(address: str) -> None:
    assert DEFAULT.refusal(address) is not None
    with pytest.raises(RequestInvalid) as raised:
        DEFAULT.check_address(address)
    assert address in raised.value.detail
    assert "RANKWISE_WEBHOOK_ALLOWED_NETWORKS" in str(raised.value.hint)


@pytest.mark.parametrize("address", [item for item in REFUSED if "%" not in item])
def test_they_are_refused_in_a_url_when_it_is_given(address: str) -> None:
    with pytest.raises(RequestInvalid) as raised:
        DEFAULT.check_url(f"https://{bracketed(address)}:8443/in")
    assert raised.value.errors[0].pointer == "/url"


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert DEFAULT.refusal(address) is None
    assert DEFAULT.check_url(f"https://{bracketed(address)}/in").scheme == "https"


@pytest.mark.parametrize(
    ("networks", "allowed", "refused"),
    [
        (["127.0.0.0/8"], ["127.0.0.1", "127.9.9.9"], ["::1", "::ffff:127.0.0.1", "10.0.0.1", "64:ff9b::7f00:1"]),
        (["10.1.0.0/16", "fd00:1::/32"], ["10.1.2.3", "fd00:1::5"], ["10.2.0.1", "fd00:2::1", "169.254.169.254"]),
        (["169.254.169.254/32"], ["169.254.169.254"], ["169.254.169.253"]),
        (["::ffff:0:0/96"], ["::ffff:127.0.0.1"], ["127.0.0.1"]),
        (["64:ff9b::/96"], ["64:ff9b::808:808"], ["64:ff9b:1::1"]),
        (["0.0.0.0/0"], ["127.0.0.1", "255.255.255.255"], ["::1", "::ffff:1.1.1.1"]),
    ],
)
def test_networks_can_be_allowed(networks: list[str], allowed: list[str], refused: list[str]) -> None:
    policy = EgressPolicy(allowed_networks=tuple(network(item) for item in networks))
    assert {item: policy.refusal(item) for item in allowed} == dict.fromkeys(allowed)
    assert None not in {policy.refusal(item) for item in refused}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://hooks.example.com/", "must begin with https://"),
        ("ftp://hooks.example.com/", "must begin with"),
        ("file:///etc/passwd", "must begin with"),
        ("gopher://hooks.example.com/", "must begin with"),
        ("hooks.example.com", "must begin with"),
        ("https://user:password@hooks.example.com/", "user name or password"),
        ("https://user@hooks.example.com/", "user name or password"),
        ("https://hooks.example.com/#part", "fragment"),
        ("https:///path", "host"),
        ("https://", "host"),
        ("https://hooks.example.com:0/", "port"),
        ("https://hooks.example.com:65536/", "port"),
        ("https://hooks.example.com:port/", "can not be read"),
        ("https://localhost/", "this server itself"),
        ("https://LOCALHOST./", "this server itself"),
        ("https://db.localhost/", "this server itself"),
        ("https://2130706433/", "neither a name nor"),
        ("https://0x7f000001/", "neither a name nor"),
        ("https://0177.0.0.1/", "can not be read"),
        ("https://127.1/", "neither a name nor"),
        ("https://127.0.0.0x1/", "neither a name nor"),
        ("https://127.0.0.1./", "leads to"),
        ("https://[::1/", "can not be read"),
        ("https://[fe80::1%25eth0]/", "the URL"),
        ("https://exa mple.com/", "neither a name nor"),
        ("https://hooks.example.com/\n", "can not be read"),
    ],
)
def test_urls_that_are_refused_when_they_are_given(url: str, words: str) -> None:
    with pytest.raises(RequestInvalid) as raised:
        DEFAULT.check_url(url)
    assert words in raised.value.detail
    assert "password@" not in raised.value.detail


def test_http_can_be_allowed() -> None:
    policy = EgressPolicy(allow_http=True)
    assert policy.check_url("http://hooks.example.com:8080/in?a=b").port == 8080
    with pytest.raises(RequestInvalid, match="must begin with https:// or http://"):
        policy.check_url("ws://hooks.example.com/")


def test_localhost_is_allowed_with_either_loopback() -> None:
    for text in ("127.0.0.0/8", "::1/128"):
        policy = EgressPolicy(allowed_networks=(network(text),))
        assert policy.check_url("https://localhost:9000/").host == "localhost"


@given(st.ip_addresses())
def test_what_the_standard_library_calls_not_global_is_never_allowed(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if not address.is_global or address.is_multicast:
        assert DEFAULT.refusal(str(address)) is not None


@given(st.ip_addresses(v=4))
def test_no_other_spelling_of_an_ipv4_address_gets_through(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for prefix in ("::ffff:0:0", "::ffff:0:0:0", "64:ff9b::", "::"):
        assert DEFAULT.refusal(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | number))) is not None
    assert DEFAULT.refusal(str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80)))) is not None
    for text in (str(number), hex(number)):
        with pytest.raises(RequestInvalid):
            DEFAULT.check_url(f"https://{text}/")


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_refused_with_words(text: str) -> None:
    try:
        DEFAULT.check_url(text)
    except RequestInvalid as error:
        assert error.errors[0].pointer == "/url"
