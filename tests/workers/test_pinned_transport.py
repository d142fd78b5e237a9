from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from webhook_receivers import (
    DEADLINE,
    LOOPBACK,
    OWNER,
    Receiver,
    create,
    make_due,
    messages,
    send,
    states,
    wait_for,
)

from storage import webhooks
from storage.database import Database
from workers.egress import EgressPolicy


class Names:
    """A resolver with answers of its own; the last one is given for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, name: str, port: int) -> Sequence[str]:
        self.asked.append(name)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "100.64.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"]
)
def test_a_name_that_leads_inside_is_refused(
    database: Database, receivers: Callable[..., Receiver], address: str
) -> None:
    receiver = receivers()
    row = create(database, f"http://hooks.test:{receiver.port}/")
    send(database, EgressPolicy(allow_http=True), resolver=Names([address]))
    assert receiver.got == []
    (message,) = messages(database, row)
    assert str(message.last_error).startswith(f"refused: the URL leads to {address}, ")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}/", "http://localhost:{port}/", "http://[::ffff:127.0.0.1]:{port}/"]
)
def test_an_address_that_was_stored_before_the_rule_is_refused(
    database: Database, receivers: Callable[..., Receiver], url: str
) -> None:
    receiver = receivers()
    row = create(database, url.format(port=receiver.port))
    send(database, EgressPolicy(allow_http=True))
    assert receiver.got == []
    assert str(messages(database, row)[0].last_error).startswith("refused")


def test_plain_http_is_refused_unless_allowed(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    row = create(database, receiver.url)
    send(database, EgressPolicy(allowed_networks=LOOPBACK.allowed_networks))
    assert receiver.got == []
    assert "https" in str(messages(database, row)[0].last_error)


def test_a_name_is_resolved_once_and_the_checked_address_is_used(
    database: Database, receivers: Callable[..., Receiver]
) -> None:
    good, inside = receivers(), receivers(host="127.0.0.2")
    only = EgressPolicy(allow_http=True, allowed_networks=(ipaddress.ip_network("127.0.0.1/32"),))
    names = Names(["127.0.0.1"], ["127.0.0.2"])  # what it says the second time is for whoever asks twice
    row = create(database, f"http://rebind.test:{good.port}/")
    send(database, only, resolver=names)
    assert names.asked == ["rebind.test"]
    ((_, headers, _),) = good.got
    assert headers["host"] == f"rebind.test:{good.port}"
    assert states(database, row) == ["delivered"]
    with database.write() as session:
        webhooks.enqueue_test(session, row.id, OWNER)
    send(database, only, resolver=names)
    assert inside.got == []
    assert "127.0.0.2" in str(messages(database, row)[1].last_error)


def test_only_the_allowed_addresses_of_a_name_are_tried(database: Database, receivers: Callable[..., Receiver]) -> None:
    receiver = receivers()
    row = create(database, f"http://hooks.test:{receiver.port}/")
    send(database, resolver=Names(["10.0.0.1", "127.0.0.9", "127.0.0.1"]))  # refused; nobody listens; the receiver
    assert states(database, row) == ["delivered"]
    assert len(receiver.got) == 1


def test_a_name_without_an_address_is_a_failure(database: Database) -> None:
    def unknown(name: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    row = create(database, "http://nowhere.test/")
    send(database, resolver=unknown)
    assert "can not be resolved" in str(messages(database, row)[0].last_error)
    make_due(database)
    send(database, resolver=Names([]))
    assert "has no address" in str(messages(database, row)[0].last_error)


def test_a_resolver_that_hangs_is_left_behind(database: Database) -> None:
    release = threading.Event()

    def hang(name: str, port: int) -> Sequence[str]:
        release.wait(DEADLINE)
        return ["127.0.0.1"]

    row = create(database, "http://slow-name.test/")
    send(database, resolver=hang, timeout_seconds=0.2)
    assert messages(database, row)[0].last_error == "no answer within 0.2 s"
    release.set()
    wait_for(lambda: not any(thread.name.startswith("resolve ") for thread in threading.enumerate()))


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for `name` and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    moment = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - datetime.timedelta(days=1))
        .not_valid_after(moment + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate_file, key_file


def test_tls_is_checked_against_the_name_although_the_address_is_pinned(
    database: Database, receivers: Callable[..., Receiver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate_file, key_file = certificate(tmp_path, "hooks.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    asked: list[str | None] = []
    context.sni_callback = lambda connection, name, _: asked.append(name)  # type: ignore[assignment]
    receiver = receivers(tls=context)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate_file))
    strict = EgressPolicy(allowed_networks=LOOPBACK.allowed_networks)
    right = create(database, f"https://hooks.test:{receiver.port}/in")
    send(database, strict, resolver=Names(["127.0.0.1"]))
    assert states(database, right) == ["delivered"]
    assert asked == ["hooks.test"]
    wrong = create(database, f"https://other.test:{receiver.port}/in")
    send(database, strict, resolver=Names(["127.0.0.1"]))
    (message,) = messages(database, wrong)
    assert message.state == "pending"
    assert "certificate" in str(message.last_error).lower()
    assert len(receiver.got) == 1
