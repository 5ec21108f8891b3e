"""Texts of Kubernetes flags and job files as values. Pure; a bad text is a ValueError that says what was expected."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import Any, TypeVar

from launcher.k8s.names import is_env_name, is_label_key, is_label_value, is_object_name, rfc1035_fault, suggest_name
from launcher.k8s.options import SecretVariable
from launcher.k8s.quantity import parse_quantity, parse_size

E = TypeVar("E", bound=enum.Enum)
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def one_of(kind: type[E], by_name: bool = False) -> Callable[[str], E]:
    """A reader of an enum's words: its values, or its names in small letters."""
    words = {(member.name.lower() if by_name else str(member.value)): member for member in kind}

    def parse(text: str) -> E:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return words[text]

    return parse


def text(value: str) -> str:
    if not value.strip():
        raise ValueError("a text, and it is empty")
    return value


def name(value: str) -> str:
    fault = rfc1035_fault(value)
    if fault:
        raise ValueError(f"small letters, digits and dashes, and it {fault} (like {suggest_name(value)})")
    return value


def object_name(value: str) -> str:
    if not is_object_name(value):
        raise ValueError(
            f"the name of an object, in small letters, digits, dashes and dots (like {suggest_name(value, 253)})"
        )
    return value


def pull_policy(value: str) -> str:
    if value not in ("Always", "IfNotPresent", "Never"):
        raise ValueError("Always, IfNotPresent or Never")
    return value


def release(value: str) -> str:
    """
    >>> release("v1.5.1")
    '1.5.1'
    """
    if not re.fullmatch(r"v?\d+(\.\d+){1,2}", value):
        raise ValueError("a version, like 1.5.1")
    return value.removeprefix("v")


def absolute_path(value: str) -> str:
    if not value.startswith("/") or ".." in value.split("/") or value.rstrip("/") == "":
        raise ValueError("an absolute path below the node's root, like /mnt/nvme/railhead")
    return value.rstrip("/")


def whole(value: str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise ValueError("a whole number, 0 or more") from None
    if number < 0:
        raise ValueError("a whole number, 0 or more")
    return number


def cpus(value: str) -> float:
    """
    >>> cpus("16"), cpus("1500m")
    (16.0, 1.5)
    """
    return parse_quantity(value)


def quantity(value: str) -> str:
    parse_quantity(value)
    return value


def size(value: str) -> str:
    parse_size(value)
    return value


def duration(value: str) -> int:
    """Seconds.

    >>> duration("90"), duration("12h")
    (90, 43200)
    """
    found = re.fullmatch(r"(\d+)\s*([smhd]?)", value.strip())
    if found is None:
        raise ValueError("seconds, or a number with s, m, h or d, like 12h")
    return int(found[1]) * _UNITS[found[2]]


def words(value: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in value.split(",") if part.strip())
    if not found:
        raise ValueError("one word or more, with commas between them")
    return found


def names(value: str) -> tuple[str, ...]:
    return tuple(object_name(word) for word in words(value))


def label_pair(value: str) -> tuple[str, str]:
    key, equals, label = value.partition("=")
    if not equals or not is_label_key(key) or not is_label_value(label):
        raise ValueError(
            "KEY=VALUE as Kubernetes takes labels: at most 63 letters, digits, dashes, dots and underscores"
        )
    return key, label


def env_pair(value: str) -> tuple[str, str | None]:
    """NAME=VALUE; NAME alone means the value that it has in this terminal (None)."""
    key, equals, content = value.partition("=")
    if not is_env_name(key):
        raise ValueError("NAME=VALUE, or NAME for the value that it has here")
    return key, content if equals else None


def secret_env(value: str) -> SecretVariable:
    """
    >>> secret_env("AWS_SECRET_ACCESS_KEY=s3/secret")
    SecretVariable(variable='AWS_SECRET_ACCESS_KEY', secret='s3', key='secret')
    """
    found = re.fullmatch(r"([^=]+)=([^/=]+)/([-._a-zA-Z0-9]+)", value)
    if found is None or not is_env_name(found[1]) or not is_object_name(found[2]):
        raise ValueError("VARIABLE=SECRET/KEY, like AWS_SECRET_ACCESS_KEY=s3-keys/secret")
    return SecretVariable(found[1], found[2], found[3])


def claim(value: str) -> tuple[str, str]:
    """
    >>> claim("checkpoints=/checkpoints")
    ('checkpoints', '/checkpoints')
    """
    name_, equals, path = value.partition("=")
    if not equals or not is_object_name(name_):
        raise ValueError("NAME=/PATH, like checkpoints=/checkpoints")
    return name_, absolute_path(path)


def toleration(value: str) -> dict[str, Any]:
    """KEY, KEY=VALUE, or either with :EFFECT.

    >>> toleration("team=vision:NoSchedule")
    {'key': 'team', 'operator': 'Equal', 'value': 'vision', 'effect': 'NoSchedule'}
    """
    pair, colon, effect = value.rpartition(":") if value.rpartition(":")[2] in _EFFECTS else (value, "", "")
    key, equals, label = pair.partition("=")
    if not is_label_key(key) or not is_label_value(label) or ":" in pair:
        raise ValueError(f"KEY, KEY=VALUE, or either with :EFFECT ({', '.join(_EFFECTS)})")
    found: dict[str, Any] = (
        {"key": key, "operator": "Equal", "value": label} if equals else {"key": key, "operator": "Exists"}
    )
    return {**found, "effect": effect} if colon else found
