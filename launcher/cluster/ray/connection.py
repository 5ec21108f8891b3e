"""Reaches a Ray cluster, or says in a sentence why it cannot.

`ray.init` is not asked to find out: where nothing answers it retries for half a minute and then ends the process, from C++, without an
exception (Ray 2.60); with a wrong token it prints twenty warnings first. So each thing that can be wrong is looked at before.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import uuid

from launcher.errors import ClusterUnavailable

CONNECT_TIMEOUT_S = 3.0
# HTTP/2 (RFC 9113, section 3.4): the client's preface with empty SETTINGS; a server answers with SETTINGS (frame type 4).
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS_TYPE = 4


def connect_to_ray(address: str) -> str:
    """Makes this process a driver of the cluster; returns the address as Ray resolved it. Raises ClusterUnavailable."""
    # Ray would print a traceback for each answer that nobody fetches; what goes wrong on a node reaches us as an event.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        import ray
    except ImportError as error:
        raise ClusterUnavailable(
            f"a Ray cluster was named, and ray cannot be imported: {error}", advice="pip install 'ray[default]'"
        ) from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    _silence_news_of_nodes()
    resolved = _resolve(address)
    _knock(address, resolved)
    _check_credentials_and_versions(resolved)
    try:
        ray.init(
            address=resolved,
            namespace=f"railhead-{uuid.uuid4().hex[:12]}",
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            configure_logging=True,
        )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnavailable(
            f"the Ray cluster at {resolved} does not take us: {_first_line(error)}",
            advice="is this machine one of its nodes? If not: ray job submit --address http://HEAD:8265 -- python -m launcher …",
        ) from error
    return resolved


def _silence_news_of_nodes() -> None:
    """Ray prints a page for each dead node of the cluster, whoever used it, on *standard output*, between the lines of our ranks, also
    with `log_to_driver=False` (2.60). What concerns us we say ourselves."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *args, **kwargs: None


def _resolve(address: str) -> str:
    """`auto` and loopback names as Ray resolves them."""
    from ray._private import services

    try:
        resolved = services.canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError) as error:
        if address == "auto":
            raise ClusterUnavailable(
                "--address auto: no Ray cluster runs on this machine, or more than one",
                advice="name it: --address HOST:PORT (`ray start --head` prints it); on this machine without Ray: --standalone",
            ) from error
        raise ClusterUnavailable(
            f"{address} is no address of a Ray cluster: {_first_line(error)}",
            advice="write HOST:PORT, the port of its head (usually 6379)",
        ) from error
    host, _, port = resolved.rpartition(":")
    if not host or not port.isdigit():
        raise ClusterUnavailable(
            f"{address} is no address of a Ray cluster", advice="write HOST:PORT, the port of its head (usually 6379)"
        )
    return str(resolved)


def _knock(address: str, resolved: str) -> None:
    """Raises ClusterUnavailable unless something that speaks gRPC listens there."""
    host, _, port = resolved.rpartition(":")
    where = resolved if resolved == address else f"{resolved} ({address})"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S) as connection:
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.sendall(_HTTP2_PREFACE)
            answer = connection.recv(9)
    except (TimeoutError, ConnectionResetError):
        answer = b""
        if not _is_open(host, int(port)):
            raise ClusterUnavailable(
                f"nothing answers at {where} within {CONNECT_TIMEOUT_S:g} s",
                advice="is the address right, and no firewall between?",
            ) from None
    except OSError as error:
        raise ClusterUnavailable(
            f"no Ray cluster at {where}: {error.strerror or error}",
            advice="is it started (`ray status --address …`), and is the address right? `ray start --head` prints it",
        ) from error
    if len(answer) < 4 or answer[3] != _HTTP2_SETTINGS_TYPE:
        raise ClusterUnavailable(
            f"what listens at {where} is no Ray cluster's head",
            advice="the port is that of `ray start --head --port` (usually 6379), not the dashboard's 8265 or the client's 10001",
        )


def _is_open(host: str, port: int) -> bool:
    try:
        socket.create_connection((host.strip("[]"), port), CONNECT_TIMEOUT_S).close()
    except OSError:
        return False
    return True


def _check_credentials_and_versions(resolved: str) -> None:
    import ray
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks it

    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        metadata = GcsClient(address=resolved).internal_kv_get(
            b"CLUSTER_METADATA", b"cluster", timeout=CONNECT_TIMEOUT_S
        )
    except ray.exceptions.AuthenticationError as error:
        has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        raise ClusterUnavailable(
            f"the Ray cluster at {resolved} wants a token, and {'takes not the one we have' if has_token else 'we have none'}",
            advice="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token) to the cluster's token",
        ) from error
    except ray.exceptions.RayError as error:
        raise ClusterUnavailable(
            f"the Ray cluster at {resolved} does not answer: {_first_line(error)}", advice="ray status shows its state"
        ) from error
    if not metadata:
        return
    cluster = json.loads(metadata)
    theirs = (str(cluster.get("ray_version")), str(cluster.get("python_version")))
    ours = (ray.__version__, platform.python_version())
    if theirs != ours:
        raise ClusterUnavailable(
            f"the Ray cluster at {resolved} runs Ray {theirs[0]} on Python {theirs[1]}, this command Ray {ours[0]} on Python {ours[1]}",
            advice="they must be the same: use the cluster's image or environment, or ray job submit",
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
