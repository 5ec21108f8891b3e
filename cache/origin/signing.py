"""Which objects of a store a plain GET can read, and as whom: what the environment's credentials allow without a further request. Pure.

A signature made with a key that is here costs nothing. With the credentials of a machine (workload identity) Google and Azure sign by a
request for each object, which may not even be allowed: those objects are read by the store's own client.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping

TRUE = ("1", "true", "yes")


class Way(enum.Enum):
    SIGNED = "signed"
    """By a url that holds for some minutes."""
    TOKEN = "token"
    """By a url with the user's own token (Azure's SAS)."""
    PUBLIC = "public"
    LIBRARY = "library"
    """Not by a plain GET."""


def way_of(scheme: str, environ: Mapping[str, str], read: Callable[[str], str]) -> Way:
    """`read`: the text of a file; OSError where there is none.

    >>> way_of("az", {"AZURE_STORAGE_ACCOUNT_KEY": "k"}, str), way_of("gs", {"GOOGLE_SKIP_SIGNATURE": "true"}, str)
    (<Way.SIGNED: 'signed'>, <Way.PUBLIC: 'public'>)
    """
    match scheme:
        case "http" | "https":
            return Way.PUBLIC
        case "s3":
            return Way.PUBLIC if _is_true(environ, "AWS_SKIP_SIGNATURE") else Way.SIGNED
        case "gs":
            if _is_true(environ, "GOOGLE_SKIP_SIGNATURE"):
                return Way.PUBLIC
            return Way.SIGNED if _holds_private_key(google_key(environ, read)) else Way.LIBRARY
        case _:
            if _is_true(environ, "AZURE_SKIP_SIGNATURE"):
                return Way.PUBLIC
            if any(environ.get(name) for name in AZURE_KEYS):
                return Way.SIGNED
            return Way.TOKEN if sas_token(environ) else Way.LIBRARY


AZURE_KEYS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY")


def sas_token(environ: Mapping[str, str]) -> str:
    """Azure's shared access signature, as a query."""
    return (environ.get("AZURE_STORAGE_SAS_KEY") or environ.get("AZURE_STORAGE_SAS_TOKEN") or "").lstrip("?")


def google_key(environ: Mapping[str, str], read: Callable[[str], str]) -> str:
    """The text of the service account that obstore uses; empty: none is named."""
    if environ.get("GOOGLE_SERVICE_ACCOUNT_KEY"):
        return environ["GOOGLE_SERVICE_ACCOUNT_KEY"]
    for name in ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS"):
        if environ.get(name):
            try:
                return read(environ[name])
            except (OSError, ValueError):
                return ""
    return ""


def google_base(key: str) -> str:
    """Where Google's store is, by a service account's file (a stand-in may be named there)."""
    return str(_fields(key).get("gcs_base_url") or "https://storage.googleapis.com").rstrip("/")


def _holds_private_key(key: str) -> bool:
    fields = _fields(key)
    return bool(fields.get("private_key")) and not fields.get("disable_oauth")


def _fields(key: str) -> Mapping[str, object]:
    try:
        fields = json.loads(key)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in TRUE
