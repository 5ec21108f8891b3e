"""AWS profiles (~/.aws/config, AWS_PROFILE, SSO, assumed roles) for obstore, which by itself reads only AWS_* variables and pod or
instance roles. botocore, which s3fs brings along, walks the chain that people know from the AWS tools.

The files and variables are looked for here and not in cli.py, because they belong to AWS's own convention, not to our configuration.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from cache.errors import AccessDenied

if TYPE_CHECKING:
    from obstore.store import S3Credential


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
    files = (
        environ.get("AWS_SHARED_CREDENTIALS_FILE", os.path.expanduser("~/.aws/credentials")),
        environ.get("AWS_CONFIG_FILE", os.path.expanduser("~/.aws/config")),
    )
    return bool(environ.get("AWS_PROFILE")) or any(exists(file) for file in files)


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
        settings["credential_provider"] = _provider(credentials)
    if region:
        settings["region"] = region
    endpoint = profile.get("endpoint_url")
    if endpoint and not (os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")):
        settings["endpoint"] = endpoint
    return settings


def _provider(credentials: Any) -> Callable[[], Awaitable[S3Credential]]:
    async def provide() -> S3Credential:
        # A refresh may ask SSO or STS over the network: not on the event loop.
        frozen = await asyncio.to_thread(credentials.get_frozen_credentials)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return provide
