"""How busy does each loader keep the accelerator? A side-by-side epoch over S3 as it is far away.

    python -m benchmarks.epoch --quick
    python -m benchmarks.epoch --repeats 3 --result benchmarks/results/epoch_2cores_202611.md

Each trial is one loader with 0 or 2 DataLoader workers, in its own process, from nothing cached: a cold epoch, then a warm one.
The S3 server is SeaweedFS behind benchmarks/shaping_proxy.py: 30 ms to the first byte, 60 MB/s per connection, 200 MB/s in all. The proxy
serves objects from its memory once it has read them: SeaweedFS takes 2 to 4 CPU ms for each small range, and on two cores it would be
measured instead of the loaders.
Three demands: *half*, the origin gives twice what is needed; *tight*, 95 % of what it gives is needed; *none*, there is no step, so that
the loader alone is measured. Trials are interleaved and repeated; medians and ranges are reported, also where Railhead loses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import epoch_data, peers
from benchmarks.epoch_report import render
from benchmarks.proxy_process import ProxyProcess
from benchmarks.seaweed import SeaweedServer, WeedMissing, aws_environment
from cache.client import Cache
from cache.client.formats.tar import TarFormat
from cache.client.publishing import publish_index

_ROOT = Path(__file__).resolve().parent.parent
_TRIAL_TIMEOUT_S = 300


DEMANDS: dict[str, float | None] = {"half": 0.5, "tight": 0.95, "none": None}
"""Share of the shaped origin that the emulated steps need; None: no step."""


@dataclass(frozen=True)
class Plan:
    """One benchmark."""

    num_samples: int = 2720
    sample_bytes: int = 192 * 1024
    samples_per_shard: int = 160
    batch_size: int = 16
    demands: tuple[str, ...] = tuple(DEMANDS)
    first_byte_s: float = 0.03
    rate_per_connection: float = 60e6
    rate_total: float = 200e6
    repeats: int = 3
    workers: tuple[int, ...] = (0, 2)
    loaders: tuple[str, ...] = peers.NAMES
    seed: int = 1

    def compute_s(self, demand: str) -> float:
        """How long a step takes; 0 for none."""
        share = DEMANDS[demand]
        return 0.0 if share is None else self.batch_size * self.sample_bytes / (share * self.rate_total)


def prepare(plan: Plan, directory: Path, server: SeaweedServer) -> tuple[Path, dict[str, str]]:
    """The dataset in every format; where its description lies, and why some loaders are left out."""
    os.environ.update(aws_environment(server.endpoint))
    server.make_bucket("epoch")
    dataset = epoch_data.write_tars(
        epoch_data.Dataset(
            "s3://epoch/data", str(directory / "local"), plan.num_samples, plan.sample_bytes, plan.samples_per_shard
        )
    )
    # As whoever writes such a data set for many readers would: `python -m cache index s3://epoch/data/tar`.
    publish_index(Cache(""), f"{dataset.url}/tar", TarFormat())
    left_out: dict[str, str] = {}
    for name in plan.loaders:
        if (package := peers.missing_package(name)) is not None:
            left_out[name] = f"package {package!r} is not installed (benchmarks/requirements.txt)"
            continue
        try:
            module: Any = peers.module_of(name)
            if hasattr(module, "write_shards"):
                module.write_shards(dataset)
        except Exception as e:
            left_out[name] = f"{type(e).__name__}: {e}".split("\n", 1)[0]
    description = directory / "dataset.json"
    dataset.save(description)
    return description, left_out


@contextlib.contextmanager
def daemon(scratch: Path, environment: dict[str, str]) -> Iterator[tuple[int, dict[str, str]]]:
    """A fresh cache daemon on an empty directory; its pid and what readers need in their environment."""
    command = [sys.executable, "-m", "cache", "serve", "--dir", str(scratch / "cache"), "--capacity", "4GB"]
    command += ["--socket", str(scratch / "s"), "--announce", "--exit-with-parent"]
    with open(scratch / "daemon.log", "wb") as log:
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, stderr=log)
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the daemon did not start: " + (scratch / "daemon.log").read_text()[-2000:])
            yield process.pid, {"RAILHEAD_CACHE_SOCKET": json.loads(line)["socket"]}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            process.stdout.close()


def trial(
    plan: Plan, name: str, num_workers: int, demand: str, description: Path, proxy: ProxyProcess, seed: int
) -> dict[str, Any]:
    """One trial's JSON, or {"error": …} with the end of what it printed."""
    about = {"loader": name, "num_workers": num_workers, "demand": demand}
    proxy.reset_counters()
    environment = os.environ | aws_environment(proxy.endpoint) | {"PYTHONWARNINGS": "ignore"}
    environment.pop("RAILHEAD_CACHE_SOCKET", None)
    with (
        tempfile.TemporaryDirectory(prefix="epoch-", ignore_cleanup_errors=True) as directory,
        contextlib.ExitStack() as stack,
    ):
        scratch = Path(directory)
        command = [sys.executable, "-m", "benchmarks.epoch_trial", "--loader", name, "--num-workers", str(num_workers)]
        command += ["--dataset", str(description), "--scratch", directory, "--seed", str(seed)]
        command += ["--control", f"http://127.0.0.1:{proxy.control_port}"]
        command += ["--batch-size", str(plan.batch_size), "--compute-s", str(plan.compute_s(demand))]
        if name.startswith("railhead"):
            pid, extra = stack.enter_context(daemon(scratch, environment))
            environment |= extra
            command += ["--daemon-pid", str(pid)]
        try:
            done = subprocess.run(
                command,
                cwd=_ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_TRIAL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {**about, "error": f"no end after {_TRIAL_TIMEOUT_S} s"}
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {**about, "error": lines[-1] if lines else f"exit {done.returncode}"}
    return {**about, **json.loads(done.stdout.strip().splitlines()[-1])}


def urls_of(description: Path) -> list[str]:
    """Every object below the data set's url."""
    return [info.url for info in Cache("").list(epoch_data.load(description).url)]


def run(plan: Plan) -> tuple[list[dict[str, Any]], dict[str, str]]:
    directory = Path(tempfile.mkdtemp(prefix="epoch-data-"))
    try:
        with SeaweedServer(directory / "weed-made") as server:
            say(f"writing {plan.num_samples} samples of {plan.sample_bytes} bytes in every loader's format …")
            description, left_out = prepare(plan, directory, server)
            for name, reason in left_out.items():
                say(f"left out: {name}: {reason}")
            trials = [
                (name, num_workers, demand)
                for demand in plan.demands
                for name in plan.loaders
                if name not in left_out
                for num_workers in plan.workers
            ]
            results = []
            with (
                ProxyProcess(server.endpoint) as proxy,
                contextlib.suppress(KeyboardInterrupt),
            ):  # then the page has what was measured by then
                proxy.keep(f"/{url.partition('://')[2]}" for url in urls_of(description))
                proxy.set(
                    first_byte_s=plan.first_byte_s,
                    rate_per_connection=plan.rate_per_connection,
                    rate_total=plan.rate_total,
                    keeps_objects=True,
                )
                for repeat in range(plan.repeats):
                    order = random.Random(plan.seed + repeat).sample(trials, len(trials))
                    for name, num_workers, demand in order:
                        # How busy others keep the machine while we do nothing: the page says how quiet it was.
                        others = psutil.cpu_percent(interval=1.0) / 100
                        result = trial(plan, name, num_workers, demand, description, proxy, plan.seed + repeat)
                        result["others_busy"] = others
                        say(
                            f"{repeat + 1}/{plan.repeats} {demand:5s} {name:20s} {num_workers} workers: {_in_short(result)}"
                        )
                        results.append(result)
            return results, left_out
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _in_short(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAILED: {result['error']}"
    parts = [
        f"{which} {result[which]['utilisation']:.1%} busy, {result[which]['samples_per_s']:.0f}/s, "
        f"{result[which]['origin_bytes'] / 1e6:.0f} MB, {result[which]['verdict']}"
        for which in ("cold", "warm", "bare")
        if which in result
    ]
    parts.append(f"first batch {result['cold']['first_batch_s']:.2f} s")
    return "; ".join(parts)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="256 samples, one repeat: does it run? Not for conclusions."
    )
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--loaders", default=",".join(peers.NAMES), help="comma-separated")
    parser.add_argument("--demands", default=",".join(DEMANDS), help="comma-separated: half, tight, none")
    parser.add_argument("--workers", default="0,2", help="comma-separated numbers of DataLoader workers")
    parser.add_argument("--result", type=Path, help="write the report here, and the raw numbers beside it as .json")
    options = parser.parse_args(argv)
    plan = Plan(
        num_samples=256 if options.quick else Plan.num_samples,
        samples_per_shard=32 if options.quick else Plan.samples_per_shard,
        repeats=options.repeats or (1 if options.quick else Plan.repeats),
        loaders=tuple(options.loaders.split(",")),
        demands=tuple(options.demands.split(",")),
        workers=tuple(int(n) for n in options.workers.split(",")),
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        results, left_out = run(plan)
    except WeedMissing as e:
        parser.exit(2, f"{e}\n")
    report = render(plan, results, left_out, f"python -m benchmarks.epoch {' '.join(argv)}")
    print(report)
    if options.result is not None:
        options.result.write_text(report)
        options.result.with_suffix(".json").write_text(json.dumps(results, indent=1))
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
