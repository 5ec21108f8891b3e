"""Secrets stay out of what is written down."""

from __future__ import annotations

from launcher.gang.masking import MASK, masked_args


def test_a_secret_argument_is_masked_whether_joined_or_apart_and_nothing_else_is() -> None:
    """The run directory is read by more people than the command line was meant for."""
    args = [
        "t.py",
        "--wandb-api-key",
        "abc",
        "--password=p=q",
        "--num-tokens",
        "5",
        "--keep",
        "-v",
        "--secret",
        "--lr",
        "1",
    ]
    assert masked_args(args) == [
        *("t.py", "--wandb-api-key", MASK, f"--password={MASK}", "--num-tokens", "5"),
        *("--keep", "-v", "--secret", "--lr", "1"),
    ]


def test_a_url_keeps_its_host_and_loses_its_user() -> None:
    assert masked_args(["http://me:pw@proxy:80/x"]) == [f"http://{MASK}@proxy:80/x"]
