"""How a process connects to a Ray cluster, what it sees there, and what it says when that fails."""

from __future__ import annotations

import logging
import socket

import ray
from ray.exceptions import AuthenticationError, RayTaskError

from workers.ray_messages import ClusterNode, Unreachable

NAMESPACE = "rankwise"
CONNECT_SECONDS = 5.0


def living_nodes() -> tuple[ClusterNode, ...]:
    """The nodes that Ray holds for alive, by id."""
    found = [
        ClusterNode(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    return tuple(sorted(found, key=lambda node: node.id))


def explain_loss(error: BaseException, node: str) -> str:
    """Why a worker is lost, for the job's error."""
    if isinstance(error, RayTaskError):
        return f"the actor on node {node} failed: {_last_line(error)}"
    if isinstance(error, ValueError):
        return f"Ray can not reserve what the slot wants: {first_line(error)}"
    causes = [line.strip() for line in str(error).splitlines() if "because" in line]
    return f"the node {node} or the actor on it was lost: {causes[0][:500] if causes else first_line(error)}"


def explain_refusal(error: BaseException, address: str, output: str) -> Unreachable:
    """Why the cluster can not be reached, and what to do.

    Args:
        output: what this process has written so far: Ray's C++ part tells there what the exception does not.
    """
    detail = f"The Ray cluster at {address} can not be used: {first_line(error)}"
    text = f"{error} {output}".lower()
    if isinstance(error, AuthenticationError) or "unauthenticated" in text or "authentication token" in text:
        return Unreachable(
            f"The Ray cluster at {address} can not be used: it wants a token, and got none or another one",
            "Set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN or in a file named by "
            "RAY_AUTH_TOKEN_PATH; with no token on the cluster, set RAY_AUTH_MODE=disabled.",
        )
    if "version mismatch" in text or ("version" in text and "python" in text):
        return Unreachable(detail, "Ray and Python must have the same versions everywhere: run one image.")
    return Unreachable(detail, "Set RANKWISE_RAY_ADDRESS to <head>:6379 on a node of it, or to ray://<head>:10001.")


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:500] if lines else type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__


def check_listens(address: str) -> None:
    """Ray itself waits long for a cluster that is not there.

    Raises:
        OSError: nothing listens at the address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS):
            pass


def connect(address: str) -> None:
    """Raises what Ray raises, or OSError."""
    check_listens(address)
    ray.init(
        address=address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=False,
    )
