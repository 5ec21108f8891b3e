"""What may be written down of an environment: names always, values unless they look like a secret. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

MASK = "***"
_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|SIGNATURE|WEBHOOK|DSN|CONNECTION_STRING", re.IGNORECASE
)
# Narrower than for variables: --num-tokens and --tokenizer are no secrets, and a run's arguments are what people look for.
_SECRET_FLAG = re.compile(r"SECRET|PASSW|PASSPHRASE|CREDENTIAL|(TOKEN|KEY)$", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def masked_args(args: Sequence[str]) -> list[str]:
    """Command-line arguments as they may be written down: the values of flags that look like secrets are left out.

    >>> masked_args(["train.py", "--api-key", "abc", "--token=xyz", "--lr", "0.1", "s3://me:pw@host/k"])
    ['train.py', '--api-key', '***', '--token=***', '--lr', '0.1', 's3://***@host/k']
    """
    shown: list[str] = []
    hides_next = False
    for arg in args:
        flag, equals, _ = arg.partition("=")
        is_secret = arg.startswith("-") and _SECRET_FLAG.search(flag) is not None
        if hides_next and not arg.startswith("-"):
            shown.append(MASK)
        elif is_secret and equals:
            shown.append(f"{flag}={MASK}")
        else:
            shown.append(_USER_IN_URL.sub(MASK, arg))
        hides_next = is_secret and not equals
    return shown


def masked(env: Mapping[str, str]) -> dict[str, str]:
    """`env` as it may be shown, sorted by name.

    >>> masked({"WANDB_API_KEY": "123", "PROXY": "http://me:pw@proxy:80", "HOME": "/root"})
    {'HOME': '/root', 'PROXY': 'http://***@proxy:80', 'WANDB_API_KEY': '***'}
    """
    return {
        name: MASK if _SECRET_NAME.search(name) else _USER_IN_URL.sub(MASK, value)
        for name, value in sorted(env.items())
    }
