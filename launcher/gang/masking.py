"""What may be written down of an environment: names always, values unless they look like a secret. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

MASK = "***"
_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|SIGNATURE|WEBHOOK|DSN|CONNECTION_STRING", re.IGNORECASE
)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as it may be shown, sorted by name.

    >>> masked({"WANDB_API_KEY": "123", "PROXY": "http://me:pw@proxy:80", "HOME": "/root"})
    {'HOME': '/root', 'PROXY': 'http://***@proxy:80', 'WANDB_API_KEY': '***'}
    """
    return {
        name: MASK if _SECRET_NAME.search(name) else _USER_IN_URL.sub(MASK, value)
        for name, value in sorted(env.items())
    }
