"""Asking a daemon by hand: is it there, and what does it say of itself. For the daemon's own start and for the command line."""

from __future__ import annotations

import os
import socket
from typing import Any

from cache.daemon import wire
from cache.daemon.channel import Channel, close_all
from cache.errors import CacheError, DaemonUnavailable

TIMEOUT_S = 5.0
PROBE_PREFIX = "probe-"


def open_channel(socket_path: str) -> Channel:
    """A channel that said hello. Raises DaemonUnavailable."""
    channel = Channel.connect(socket_path, timeout_s=TIMEOUT_S)
    try:
        hello = {
            "op": "hello",
            "version": wire.PROTOCOL_VERSION,
            "client_id": f"{PROBE_PREFIX}{os.getpid()}-{id(channel):x}",
            "pid": os.getpid(),
        }
        _, fds = channel.request(hello, timeout_s=TIMEOUT_S)
        close_all(fds)
    except CacheError:
        channel.close()
        raise
    return channel


def answers(socket_path: str) -> bool:
    try:
        open_channel(socket_path).close()
    except DaemonUnavailable:
        return False
    return True


def is_listening(socket_path: str) -> bool:
    """Whether any living program, a cache daemon or not, frozen or not, has this socket; False for what a dead one left behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(socket_path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def status(socket_path: str) -> dict[str, Any] | None:
    """The daemon's account, None when nobody answers."""
    try:
        channel = open_channel(socket_path)
    except DaemonUnavailable:
        return None
    try:
        frame, _ = channel.request({"op": "status"}, timeout_s=TIMEOUT_S)
    except DaemonUnavailable:
        return None
    finally:
        channel.close()
    return dict(frame.header["status"])
