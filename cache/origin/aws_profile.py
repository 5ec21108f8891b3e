"""AWS profiles (~/.aws/config, AWS_PROFILE, SSO, assumed roles) for obstore, which by itself reads only AWS_* variables and pod or
instance roles. botocore, which s3fs brings along, walks the chain that people know from the AWS tools.

The files and variables are looked for here and not in cli.py, because they belong to AWS's own convention, not to our configuration.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cache.errors import AccessDenied

if TYPE_CHECKING:
    from obstore.store import S3Credential


ASK_AGAIN = timedelta(minutes=5, seconds=2)
"""obstore asks for keys again five minutes before they expire. So this makes it ask every two seconds, which costs two looks at files."""


def wants_profile(environ: Mapping[str, str], exists: Callable[[str], bool]) -> bool:
    """Whether credentials should come from a profile: no keys, pod role or "unsigned" in the environment, and a profile to read.

    >>> wants_profile({"AWS_PROFILE": "research"}, lambda path: False)
    True
    >>> wants_profile({"AWS_PROFILE": "research", "AWS_ACCESS_KEY_ID": "x"}, lambda path: True)
    False
    """
    settled = (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    )
    if any(environ.get(name) for name in settled):
        return False
    return bool(environ.get("AWS_PROFILE")) or any(exists(file) for file in _files(environ))


def profile_settings() -> dict[str, Any]:
    """Arguments for obstore's S3Store out of the user's AWS profile; empty where none is wanted, found or usable."""
    if not wants_profile(os.environ, os.path.exists):
        return {}
    import botocore.exceptions  # type: ignore[import-untyped]
    import botocore.session  # type: ignore[import-untyped]

    try:
        session = botocore.session.Session()
        credentials = session.get_credentials()
        region, profile = session.get_config_variable("region"), session.get_scoped_config()
    except botocore.exceptions.ProfileNotFound as e:
        raise AccessDenied(f"AWS: {e}", advice="Set AWS_PROFILE to a profile in ~/.aws/config, or unset it.") from e
    settings: dict[str, Any] = {}
    if credentials is not None:
        settings["credential_provider"] = ProfileCredentials(credentials)
    if region:
        settings["region"] = region
    endpoint = profile.get("endpoint_url")
    if endpoint and not (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")):
        settings["endpoint"] = endpoint
    return settings


class ProfileCredentials:
    """What obstore asks for keys. Looks at the profile's files again whenever they have changed, because `aws sso login`, a rotating secret
    or a helper of the site writes new keys into them while the daemon runs; botocore reads them once. Any thread."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials
        self._seen = _files_seen()
        self._was_refused = False
        self._lock = threading.Lock()

    def refused(self) -> None:
        """A store did not accept these keys: next time the whole chain is walked anew, a `credential_process` included."""
        self._was_refused = True

    def __call__(self) -> S3Credential:
        """Blocks: a refresh may ask SSO or STS over the network, or run a program."""
        import botocore.session

        with self._lock:
            seen = _files_seen()
            if self._was_refused or seen != self._seen:
                self._was_refused, self._seen = False, seen
                # None while somebody is writing the file, or has logged out: the old keys say it better than no keys.
                self._credentials = botocore.session.Session().get_credentials() or self._credentials
            frozen = self._credentials.get_frozen_credentials()
            ask_again_at = datetime.now(UTC) + ASK_AGAIN
            return {
                "access_key_id": frozen.access_key,
                "secret_access_key": frozen.secret_key,
                "token": frozen.token,
                "expires_at": min(getattr(self._credentials, "_expiry_time", None) or ask_again_at, ask_again_at),
            }


def _files(environ: Mapping[str, str]) -> tuple[str, str]:
    return (
        environ.get("AWS_SHARED_CREDENTIALS_FILE", os.path.expanduser("~/.aws/credentials")),
        environ.get("AWS_CONFIG_FILE", os.path.expanduser("~/.aws/config")),
    )


def _files_seen() -> tuple[tuple[int, ...], ...]:
    """What changes when one of the files does."""
    found = []
    for path in _files(os.environ):
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)
