"""What NCCL's own log lines (NCCL_DEBUG=INFO) prove about the network that carried the traffic.

Nobody can tell from outside whether RDMA is really used: NCCL falls back to TCP without a word. Its log says it in two
places, which network it chose and over what each channel was connected; the second is the proof. The lines are those of
`src/transport/net.cc` and `src/transport/net_ib/`, unchanged in form since NCCL 2.8.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from launcher.fabric.findings import Finding, Severity
from launcher.fabric.hcas import Transport

_VERSION = re.compile(r"NCCL version (\d+\.\d+\.\d+)")
_NETWORK = re.compile(r"NCCL INFO Using network (.+?)\s*$")
_CHANNEL = re.compile(r"NCCL INFO Channel \d+(?:/\d+)? : \S+ -> \S+(?: \[(?:send|receive)\])? via (.+?)\s*$")
_DEVICES = re.compile(r"NCCL INFO NET/(?:IB|Socket) : Using (.+?)(?:;|$)")
_DEVICE = re.compile(r"\[\d+\]([^\s:]+)")
_NO_GDR = re.compile(r"GPU Direct RDMA Disabled for HCA \d+ '([^']+)'")


@dataclass(frozen=True)
class TransportEvidence:
    """What one rank's log says."""

    version: str | None = None
    network: str | None = None
    """The network plugin that NCCL chose: IB, Socket, AWS Libfabric, gIB, …; None if the log does not say."""
    devices: tuple[str, ...] = ()
    channels: Mapping[str, int] = field(default_factory=dict)
    """Channels between ranks by how they are connected: "NET/IB/GDRDMA", "NET/Socket", "P2P", "SHM"."""
    without_gdr: tuple[str, ...] = ()
    """HCAs for which GPUDirect RDMA is off."""

    @property
    def network_channels(self) -> dict[str, int]:
        """Only those that leave the node."""
        return {way: count for way, count in self.channels.items() if way.startswith("NET/")}


def read_log(lines: Iterable[str]) -> TransportEvidence:
    """The evidence in the lines of one rank's log; lines of other programs are passed over."""
    version = network = None
    devices: list[str] = []
    channels: Counter[str] = Counter()
    without_gdr: list[str] = []
    for line in lines:
        if "NCCL" not in line:
            continue
        if match := _VERSION.search(line):
            version = match.group(1)
        elif match := _NETWORK.search(line):
            network = match.group(1)
        elif match := _CHANNEL.search(line):
            channels[_way(match.group(1))] += 1
        elif match := _DEVICES.search(line):
            devices = _DEVICE.findall(match.group(1))
        elif match := _NO_GDR.search(line):
            without_gdr.append(match.group(1))
    return TransportEvidence(version, network, tuple(devices), dict(channels), tuple(dict.fromkeys(without_gdr)))


def merged(evidence: Iterable[TransportEvidence]) -> TransportEvidence:
    """What the logs of several ranks say together."""
    seen = [one for one in evidence if one.channels or one.network]
    channels: Counter[str] = Counter()
    for one in seen:
        channels.update(one.channels)
    return TransportEvidence(
        next((one.version for one in seen if one.version), None),
        next((one.network for one in seen if one.network), None),
        tuple(dict.fromkeys(device for one in seen for device in one.devices)),
        dict(channels),
        tuple(dict.fromkeys(hca for one in seen for hca in one.without_gdr)),
    )


def _way(text: str) -> str:
    """ "NET/IB/0/GDRDMA/Shared" → "NET/IB/GDRDMA"; "P2P/CUMEM/read" → "P2P"."""
    parts = text.split("/")
    if parts[0] != "NET":
        return parts[0]
    # The network's own name may hold slashes and spaces; its number and what follows do not belong to it.
    number = next((idx for idx, part in enumerate(parts[2:], 2) if part.split("(")[0].isdigit()), len(parts))
    suffix = "/GDRDMA" if "GDRDMA" in parts[number:] or "GDRDMA" in parts[2:] else ""
    name = "/".join(part for part in parts[1:number] if part not in ("GDRDMA", "Shared"))
    return f"NET/{name}{suffix}"


def carried_by(evidence: TransportEvidence, *, with_counts: bool = True) -> str:
    """What carries the traffic, in a few words.

    >>> carried_by(TransportEvidence("2.27.5", "IB", ("mlx5_0",), {"NET/IB/GDRDMA": 2, "P2P": 1}))
    'NET/IB/GDRDMA (2 channels), P2P (1 channels); NCCL 2.27.5, devices mlx5_0'
    >>> carried_by(TransportEvidence(channels={"NET/IB/GDRDMA": 2, "P2P": 1}), with_counts=False)
    'NET/IB/GDRDMA'
    """
    if not with_counts:
        return ", ".join(sorted(evidence.network_channels)) or "nothing"
    ways = ", ".join(f"{way} ({count} channels)" for way, count in sorted(evidence.channels.items())) or "nothing"
    version = f"NCCL {evidence.version}" if evidence.version else "NCCL of unknown version"
    devices = f", devices {', '.join(evidence.devices)}" if evidence.devices else ""
    return f"{ways}; {version}{devices}"


def transport_findings(
    evidence: TransportEvidence, expected: Transport, host: str, *, has_gpus: bool = True
) -> list[Finding]:
    """What the log shows against what the node's facts promise. Silent if the log has no channel between nodes."""
    ways = evidence.network_channels
    if not ways or expected == "socket":
        return []
    shown = ", ".join(f"{count} channels via {way}" for way, count in sorted(ways.items()))
    over_tcp = {way for way in ways if way.startswith("NET/Socket")}
    if over_tcp:
        return [
            Finding(
                "tcp-fallback",
                Severity.ERROR,
                (host,),
                f"NCCL's log: {shown}; the node has {expected}",
                "the job runs over TCP, a fraction of the bandwidth, and would not have said so",
                "NCCL_DEBUG=INFO tells why at the start (no device, no plugin, no permission); see the other findings",
            )
        ]
    if has_gpus and any(not way.endswith("/GDRDMA") for way in ways):
        without = f"; off for {', '.join(evidence.without_gdr)}" if evidence.without_gdr else ""
        return [
            Finding(
                "gpudirect-unused",
                Severity.WARNING,
                (host,),
                f"NCCL's log: {shown}{without}",
                "bytes between nodes pass through host memory, about half the bandwidth",
                "load nvidia_peermem, or use the open driver with a kernel that has DMA-BUF; check NCCL_NET_GDR_LEVEL",
            )
        ]
    return []
