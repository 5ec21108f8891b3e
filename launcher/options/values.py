"""Texts of flags as values, each with the reason when it cannot be one. Pure; a bad text is a ValueError that says what was expected."""

from __future__ import annotations

import math
import re
import signal

from launcher.spec import (
    BINDINGS,
    CACHE_PEERS,
    OnHang,
    ProgressDisplay,
    SecondSignal,
    StartMethod,
    Stream,
    StreamChoice,
)

PROCS_WISHES = ("auto", "gpu", "cpu")


def parse_count(text: str) -> int:
    """A whole number, 0 or more."""
    number = _parse_int(text, "a whole number, 0 or more")
    if number < 0:
        raise ValueError("a whole number, 0 or more")
    return number


def parse_amount(text: str) -> float:
    """A number, 0 or more; fractions are fine.

    >>> parse_amount("0.5")
    0.5
    """
    try:
        number = float(text)
    except ValueError:
        raise ValueError("a number, 0 or more") from None
    if not 0 <= number < math.inf:
        raise ValueError("a number, 0 or more")
    return number


def parse_progress(text: str) -> ProgressDisplay:
    """`--show-progress`."""
    try:
        return ProgressDisplay(text)
    except ValueError:
        raise ValueError(", ".join(each.value for each in ProgressDisplay)) from None


def parse_hang_timeout(text: str) -> float | None:
    """`--hang-timeout`: None for auto, inf for off.

    >>> parse_hang_timeout("auto"), parse_hang_timeout("off"), parse_hang_timeout("90")
    (None, inf, 90.0)
    """
    if text in ("auto", "none"):
        return None
    if text in ("off", "inf"):
        return math.inf
    try:
        return parse_amount(text)
    except ValueError:
        raise ValueError("auto, off, or seconds") from None


def parse_on_hang(text: str) -> OnHang:
    """`--on-hang`."""
    try:
        return OnHang(text)
    except ValueError:
        raise ValueError(", ".join(each.value for each in OnHang)) from None


def parse_second_signal(text: str) -> SecondSignal:
    """`--second-signal`."""
    try:
        return SecondSignal(text)
    except ValueError:
        raise ValueError(", ".join(each.value for each in SecondSignal)) from None


def parse_nodes(text: str) -> tuple[int, int]:
    """`--nnodes`: least and most.

    >>> parse_nodes("2"), parse_nodes("1:4")
    ((2, 2), (1, 4))
    """
    expected = "N or MIN:MAX with 1 <= MIN <= MAX, like 2 or 1:4"
    parts = [_parse_int(part, expected) for part in text.split(":")]
    if len(parts) > 2 or not 1 <= parts[0] <= parts[-1]:
        raise ValueError(expected)
    return parts[0], parts[-1]


def parse_procs(text: str) -> int | str:
    """`--nproc-per-node`: a number, or a wish that the machine or the cluster must turn into one."""
    if text in PROCS_WISHES:
        return text
    if text == "xpu":
        raise ValueError("the number of XPUs, which are not counted here; write it out")
    number = _parse_int(text, "a whole number from 1, or auto, gpu or cpu")
    if number < 1:
        raise ValueError("at least 1 rank per node")
    return number


def parse_port(text: str) -> int | None:
    """A port; 0 leaves the choice to us, as it does under torchrun."""
    number = _parse_int(text, "a port, 1 to 65535")
    if not 0 <= number < 65536:
        raise ValueError("a port, 1 to 65535")
    return number or None


def parse_size(text: str) -> str:
    """A number of bytes as `python -m cache` reads it; handed on as it was written.

    >>> parse_size("200GiB"), parse_size("1.5 TB")
    ('200GiB', '1.5 TB')
    """
    if not re.fullmatch(r"\s*\d[\d_]*(\.\d+)?\s*([kmgt]i?)?b?\s*", text, re.IGNORECASE) or not re.search(
        r"[1-9]", text
    ):
        raise ValueError("a number of bytes above 0, like 200GiB or 1.5TB")
    return text


def parse_streams(text: str) -> StreamChoice:
    """`-r` and `-t`: `3`, or `0:1,1:3` by local rank. More than torchrun takes: local ranks above 9.

    >>> parse_streams("3").of(5).name, parse_streams("0:1,12:3").of(12).name
    ('BOTH', 'BOTH')
    """
    expected = "0 to 3 (1 stdout, 2 stderr, 3 both), or LOCAL_RANK:0-3 pairs like 0:1,1:3"
    if re.fullmatch(r"[0-3]", text):
        return StreamChoice(Stream(int(text)))
    if not re.fullmatch(r"\d+:[0-3](,\d+:[0-3])*", text):
        raise ValueError(expected)
    pairs = [pair.split(":") for pair in text.split(",")]
    return StreamChoice(by_local_rank=tuple((int(rank), Stream(int(streams))) for rank, streams in pairs))


def parse_ranks(text: str) -> frozenset[int]:
    """Ranks, single or in ranges with both ends.

    >>> sorted(parse_ranks("0,8-10"))
    [0, 8, 9, 10]
    """
    expected = "ranks like 0,8-15"
    ranks: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None:
            raise ValueError(expected)
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first > 1_000_000:
            raise ValueError(expected)
        ranks.update(range(first, last + 1))
    return frozenset(ranks)


def parse_texts(text: str) -> tuple[str, ...]:
    """A comma-separated list in which `,,` is a comma.

    >>> parse_texts("loss,a,,b")
    ('loss', 'a,b')
    """
    comma = "\0"
    return tuple(item.replace(comma, ",") for item in text.replace(",,", comma).split(","))


def parse_resources(text: str) -> tuple[tuple[str, float], ...]:
    """`--resources`: names with amounts. CPU and GPU have flags of their own.

    >>> parse_resources("rdma=1,fast_disk=0.5")
    (('rdma', 1.0), ('fast_disk', 0.5))
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, amount = part.rpartition("=")
        name = name.strip()
        if not equals or not name:
            raise ValueError("NAME=N pairs like rdma=1,fast_disk=0.5")
        if name in ("CPU", "GPU"):
            raise ValueError(f"names other than {name}; for that there is --{name.lower()}s-per-proc")
        if name in found:
            raise ValueError(f"each name once, and {name} is there twice")
        found[name] = parse_amount(amount)
    return tuple(found.items())


def parse_binding(text: str) -> str:
    """`--bind`."""
    if text not in BINDINGS:
        raise ValueError(" or ".join(BINDINGS))
    return text


def parse_cache_peers(text: str) -> str:
    """`--cache-peers`."""
    if text not in CACHE_PEERS:
        raise ValueError(" or ".join(CACHE_PEERS))
    return text


def parse_numa_binding(text: str) -> str:
    """torchrun's `--numa-binding` (torch/numa/binding.py, AffinityMode)."""
    known = ("node", "socket", "exclusive", "core-complex")
    if text not in known:
        raise ValueError(" or ".join(known))
    return text


def parse_start_method(text: str) -> StartMethod:
    """torchrun's three words. Nothing is ever forked from the launcher itself, so `fork` means the fork server too.

    >>> parse_start_method("fork").name
    'FORK_SERVER'
    """
    if text not in ("spawn", "fork", "forkserver"):
        raise ValueError("spawn, fork or forkserver")
    return StartMethod.SPAWN if text == "spawn" else StartMethod.FORK_SERVER


def parse_signals(text: str) -> tuple[str, ...]:
    """`--signals-to-handle`: names that this machine knows."""
    names = tuple(name.strip().upper() for name in text.split(",") if name.strip())
    for name in names:
        if name in ("SIGKILL", "SIGSTOP") or name not in signal.Signals.__members__:
            raise ValueError(f"names of signals that can be handled, and {name} is none")
    return names


def _parse_int(text: str, expected: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(expected) from None
