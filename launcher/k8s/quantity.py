"""Kubernetes' quantities as numbers and back. Pure."""

from __future__ import annotations

import math
import re

_SUFFIXES = {
    "": 1.0,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
    "Pi": 2.0**50,
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?|\.\d+)([a-zA-Z]*)")
GIB = 2**30
MIB = 2**20


def parse_quantity(text: str) -> float:
    """What a Kubernetes quantity counts. Raises ValueError that says how it is written.

    >>> parse_quantity("1500m"), parse_quantity("2Gi"), parse_quantity("8")
    (1.5, 2147483648.0, 8.0)
    """
    found = _QUANTITY.fullmatch(text)
    if found is None or found[2] not in _SUFFIXES:
        raise ValueError(f"a Kubernetes quantity, like 64Gi, 500m or 8{_advice(text)}")
    return float(found[1]) * _SUFFIXES[found[2]]


def _advice(text: str) -> str:
    """People write 64GB, 64GiB and 64 gi; Kubernetes reads none of them."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgtp])(i?)b?\s*", text, re.IGNORECASE)
    return f" (did you mean {found[1]}{found[2].upper()}i?)" if found else ""


def parse_size(text: str) -> int:
    """Bytes, written as people or as Kubernetes write them: 200GiB, 200Gi, 200GB.

    >>> parse_size("200GiB") == parse_size("200Gi"), parse_size("1.5TB")
    (True, 1500000000000)
    """
    cleaned = text.strip().replace(" ", "")
    if cleaned[-1:] in "bB" and cleaned[-2:-1] not in "0123456789":
        cleaned = cleaned[:-1]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtp]?i?)", cleaned, re.IGNORECASE)
    if found is None or found[2].lower() == "i":
        raise ValueError("a size, like 200GiB or 1.5TiB")
    unit = found[2]
    unit = unit[:1].upper() + unit[1:].lower() if unit else ""
    return int(float(found[1]) * _SUFFIXES["k" if unit == "K" else unit])


def format_bytes(count: float) -> str:
    """A quantity of at least `count` bytes, in whole Mi or Gi.

    >>> format_bytes(3 * 2**30), format_bytes(2**30 + 1)
    ('3Gi', '1025Mi')
    """
    mebibytes = math.ceil(count / MIB)
    return f"{mebibytes // 1024}Gi" if mebibytes % 1024 == 0 and mebibytes else f"{mebibytes}Mi"


def format_cpus(count: float) -> str:
    """
    >>> format_cpus(8.0), format_cpus(0.5)
    ('8', '500m')
    """
    return f"{count:.0f}" if count == int(count) else f"{math.ceil(count * 1000)}m"
