"""Which texts Kubernetes takes as names, labels and variables, and what to do about those it does not. Pure."""

from __future__ import annotations

import re

_RFC1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_RFC1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")

MAX_RAYJOB_NAME = 47
"""KubeRay's own bound, below Kubernetes' 63: names of clusters, services and pods are made from it."""
MAX_RAYCRONJOB_NAME = 36
MAX_CRONJOB_NAME = 52
"""Kubernetes' bound: 11 characters are added for each Job."""
MAX_LABEL = 63


def rfc1035_fault(name: str, limit: int = MAX_LABEL) -> str | None:
    """Why this is no RFC 1035 label of at most `limit` characters; None if it is one.

    >>> rfc1035_fault("resnet"), rfc1035_fault("2nd-try")
    (None, 'must begin with a small letter, not 2')
    """
    if not name:
        return "is empty"
    if len(name) > limit:
        return f"has {len(name)} characters, at most {limit} are allowed"
    if _RFC1035.fullmatch(name):
        return None
    if not name[0].isascii() or not name[0].islower():
        return f"must begin with a small letter, not {name[0]}"
    if name[-1] == "-":
        return "must not end with a dash"
    wrong = sorted(set(re.sub(r"[-a-z0-9]", "", name)))
    return f"may hold small letters, digits and dashes only, not {' '.join(wrong)}"


def suggest_name(text: str, limit: int = MAX_RAYJOB_NAME) -> str:
    """A legal name as near as can be.

    >>> suggest_name("ResNet_50.v2")
    'resnet-50-v2'
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    name = name if name[:1].isalpha() else f"job-{name}"
    return name[:limit].rstrip("-")


def is_object_name(text: str) -> bool:
    """RFC 1123 subdomain: what most Kubernetes objects may be called."""
    return len(text) <= 253 and _RFC1123.fullmatch(text) is not None


def is_label_value(text: str) -> bool:
    return len(text) <= MAX_LABEL and _LABEL_VALUE.fullmatch(text) is not None


def is_label_key(text: str) -> bool:
    """
    >>> is_label_key("kueue.x-k8s.io/queue-name"), is_label_key("a b")
    (True, False)
    """
    prefix, slash, name = text.rpartition("/")
    return bool(name) and is_label_value(name) and (not slash or is_object_name(prefix))


def is_env_name(text: str) -> bool:
    return _ENV_NAME.fullmatch(text) is not None
