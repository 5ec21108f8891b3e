"""Which objects a plain GET can read: what the credentials at hand can sign without asking anybody, and never more."""

from __future__ import annotations

import json

import pytest

from cache.origin.signing import Way, way_of

FILES = {
    "key.json": json.dumps({"type": "service_account", "private_key": "-----BEGIN", "client_email": "a@b"}),
    "user.json": json.dumps({"type": "authorized_user", "refresh_token": "r"}),
    "broken.json": "{",
}


def read(path: str) -> str:
    try:
        return FILES[path]
    except KeyError:
        raise FileNotFoundError(path) from None


CASES = [
    ("s3", {}, Way.SIGNED),
    ("s3", {"AWS_SKIP_SIGNATURE": "True"}, Way.PUBLIC),
    ("https", {}, Way.PUBLIC),
    ("gs", {}, Way.LIBRARY),
    ("gs", {"GOOGLE_SKIP_SIGNATURE": "1"}, Way.PUBLIC),
    ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "key.json"}, Way.SIGNED),
    ("gs", {"GOOGLE_SERVICE_ACCOUNT": "key.json"}, Way.SIGNED),
    ("gs", {"GOOGLE_SERVICE_ACCOUNT_KEY": FILES["key.json"]}, Way.SIGNED),
    ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "user.json"}, Way.LIBRARY),
    ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "broken.json"}, Way.LIBRARY),
    ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "missing.json"}, Way.LIBRARY),
    ("az", {}, Way.LIBRARY),
    ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "k"}, Way.SIGNED),
    ("abfss", {"AZURE_STORAGE_ACCESS_KEY": "k"}, Way.SIGNED),
    ("az", {"AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=x"}, Way.TOKEN),
    ("az", {"AZURE_FEDERATED_TOKEN_FILE": "/var/run/token"}, Way.LIBRARY),
]


@pytest.mark.parametrize(("scheme", "environ", "way"), CASES)
def test_only_what_can_be_signed_here_is_read_by_plain_requests(scheme: str, environ: dict[str, str], way: Way) -> None:
    assert way_of(scheme, environ, read) is way
