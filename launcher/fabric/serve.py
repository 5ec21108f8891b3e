"""A peer in a process of its own, driven by JSON lines: `python -m launcher.fabric.serve ADDRESS`, and the other side of it.

`JsonPeer` turns a peer's methods into questions; who carries them (a pipe, `ip netns exec`, a Ray actor) is its subclass's business.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from launcher.fabric.jsonlines import JsonLines, questions
from launcher.fabric.peer import LOOKUP_S, TIMEOUT_S, Connection, DatagramOutcome, Endpoint, LocalPeer
from launcher.fabric.workers import COMPUTE_S, MARGIN_S, Ready, Reduced, Seat

START_S = 60.0
"""A fresh interpreter on a crowded machine."""

ANSWER_S = 60.0
"""For what has a deadline of its own within the peer; longer than any of them."""


def command_of(address: str) -> list[str]:
    """What starts a peer on this machine."""
    return [sys.executable, "-P", "-m", "launcher.fabric.serve", address]


class JsonPeer(ABC):
    """A `conduct.Peer` whose questions travel as JSON."""

    @abstractmethod
    def ask(self, question: Mapping[str, Any], timeout_s: float) -> Any:
        """Carries one question to the peer. Raises ConnectionError when no answer will come."""

    def endpoint(self) -> Endpoint:
        return Endpoint(**self.ask({"call": "endpoint"}, ANSWER_S))

    def connect(self, targets: Sequence[Endpoint], timeout_s: float = TIMEOUT_S) -> list[Connection]:
        answers = self.ask({"call": "connect", "targets": _plain(targets), "timeout_s": timeout_s}, ANSWER_S)
        return [Connection(**item) for item in answers]

    def datagrams(self, targets: Sequence[Endpoint], timeout_s: float = TIMEOUT_S) -> list[DatagramOutcome]:
        answers = self.ask({"call": "datagrams", "targets": _plain(targets), "timeout_s": timeout_s}, ANSWER_S)
        return [DatagramOutcome(**item) for item in answers]

    def transfer(self, target: Endpoint, seconds: float) -> float:
        return float(self.ask({"call": "transfer", "targets": _plain([target]), "seconds": seconds}, ANSWER_S))

    def lookup(self, names: Sequence[tuple[str, str]]) -> list[str]:
        question = {"call": "lookup", "names": [list(pair) for pair in names]}
        return [str(problem) for problem in self.ask(question, ANSWER_S + LOOKUP_S)]

    def compute(self) -> dict[str, float]:
        return {str(kind): float(seconds) for kind, seconds in self.ask({"call": "compute"}, ANSWER_S).items()}

    def prepare(self, env: Mapping[str, str]) -> None:
        self.ask({"call": "prepare", "env": dict(env)}, ANSWER_S)

    def ready(self, timeout_s: float) -> Ready:
        return Ready(**self.ask({"call": "ready", "timeout_s": timeout_s}, 2 * timeout_s + MARGIN_S))

    def store(self) -> int:
        return int(self.ask({"call": "store"}, ANSWER_S))

    def reduce(self, seat: Seat) -> Reduced:
        return Reduced(**self.ask({"call": "reduce", "seat": asdict(seat)}, seat.timeout_s + 2 * MARGIN_S))

    def gpu_compute(self) -> list[dict[str, float]]:
        return [
            {str(kind): float(seconds) for kind, seconds in gpu.items()}
            for gpu in self.ask({"call": "gpu_compute"}, COMPUTE_S + MARGIN_S)
        ]

    def nccl_log(self) -> list[str]:
        return [str(line) for line in self.ask({"call": "nccl_log"}, ANSWER_S)]


def _plain(targets: Sequence[Endpoint]) -> list[dict[str, Any]]:
    return [asdict(target) for target in targets]


class ProcessPeer(JsonPeer):
    """A peer in a child process. `command` starts it: `command_of`, behind `ip netns exec`, ssh. One call at a time."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._lines = JsonLines(command, env)
        try:
            self._endpoint = Endpoint(**self._lines.read(START_S))
        except BaseException:
            self._lines.close()
            raise

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> Any:
        return self._lines.ask(question, timeout_s)

    def kill(self) -> None:
        """From any thread: whatever is asked now is lost."""
        self._lines.kill()

    def close(self) -> int:
        """Ends it; its exit code."""
        return self._lines.close()


def answer(peer: LocalPeer, question: Mapping[str, Any]) -> Any:
    """The peer's answer to one question, as plain data."""
    targets = [Endpoint(**target) for target in question.get("targets", ())]
    match question["call"]:
        case "endpoint":
            return asdict(peer.endpoint())
        case "connect":
            return [asdict(item) for item in peer.connect(targets, question["timeout_s"])]
        case "datagrams":
            return [asdict(item) for item in peer.datagrams(targets, question["timeout_s"])]
        case "transfer":
            return peer.transfer(targets[0], question["seconds"])
        case "lookup":
            return peer.lookup([(name, address) for name, address in question["names"]])
        case "compute":
            return peer.compute()
        case "prepare":
            return peer.prepare(question["env"])
        case "ready":
            return asdict(peer.ready(question["timeout_s"]))
        case "store":
            return peer.store()
        case "reduce":
            return asdict(peer.reduce(Seat(**question["seat"])))
        case "gpu_compute":
            return peer.gpu_compute()
        case "nccl_log":
            return peer.nccl_log()
    raise ValueError(f"unknown call {question['call']!r}")


def main(argv: Sequence[str]) -> int:
    """Serves one peer: prints its endpoint, then answers one JSON line for each JSON line; ends with its input."""
    if len(argv) != 1:
        print("usage: python -m launcher.fabric.serve ADDRESS", file=sys.stderr)
        return 64
    try:
        peer = LocalPeer(argv[0])
    except OSError as error:
        print(f"cannot listen on {argv[0]}: {error}", file=sys.stderr)
        return 1
    try:
        print(json.dumps(asdict(peer.endpoint())), flush=True)
        for question in questions():
            print(json.dumps(answer(peer, question)), flush=True)
    finally:
        peer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
