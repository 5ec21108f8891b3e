"""A peer of the preflight in memory: healthy unless it is told otherwise. `gang` makes several that know each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launcher.fabric.peer import Connection, DatagramOutcome, Endpoint
from launcher.fabric.workers import Ready, Reduced, Seat

RATE = 3e9
REDUCE_S = 0.01
MATMUL_S = 0.02


@dataclass(eq=False)
class FakePeer:
    position: int
    rate: float = RATE
    reduce_s: float = REDUCE_S
    cpu_s: float = MATMUL_S
    gpus_s: tuple[float, ...] = ()
    """By GPU: seconds for a matrix product."""
    is_deaf: bool = False
    """Nobody can connect to it."""
    dies_at: str = ""
    """Raises when this is asked, and ever after."""
    reduce_problem: str = ""
    log: tuple[str, ...] = ()
    friends: Sequence[FakePeer] = ()
    asked: list[str] = field(default_factory=list)
    env: Mapping[str, str] = field(default_factory=dict)
    is_closed: bool = False

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.dies_at and self.dies_at in self.asked:
            raise ConnectionError(f"died when asked to {self.dies_at}")

    def endpoint(self) -> Endpoint:
        self._ask("endpoint")
        return Endpoint(f"10.0.0.{self.position + 1}", self.position, 0, "token")

    def connect(self, targets: Sequence[Endpoint], timeout_s: float = 1.0) -> list[Connection]:
        self._ask("connect")
        return [
            Connection(False, "refused") if self.friends[target.tcp_port].is_deaf else Connection(True, "", 0.0)
            for target in targets
        ]

    def datagrams(self, targets: Sequence[Endpoint], timeout_s: float = 1.0) -> list[DatagramOutcome]:
        self._ask("datagrams")
        return [DatagramOutcome(1472, True, True) for _ in targets]

    def transfer(self, target: Endpoint, seconds: float) -> float:
        self._ask("transfer")
        return min(self.rate, self.friends[target.tcp_port].rate)

    def compute(self) -> dict[str, float]:
        self._ask("compute")
        return {"matmul": self.cpu_s}

    def lookup(self, names: Sequence[tuple[str, str]]) -> list[str]:
        self._ask("lookup")
        return ["" for _ in names]

    def prepare(self, env: Mapping[str, str]) -> None:
        self._ask("prepare")
        self.env = dict(env)

    def ready(self, timeout_s: float) -> Ready:
        self._ask("ready")
        return Ready("nccl" if self.gpus_s else "gloo", len(self.gpus_s))

    def store(self) -> int:
        self._ask("store")
        return 1 + self.position

    def reduce(self, seat: Seat) -> Reduced:
        self._ask("reduce")
        leader = self.friends[seat.port - 1]
        partners = [peer for peer in self.friends if peer in (self, leader)]
        if seat.num_nodes > 2:
            partners = [peer for peer in self.friends if seat.num_nodes == len(self.friends) or not peer.reduce_problem]
        broken = [peer for peer in partners if peer.reduce_problem]
        if self.reduce_problem:
            return Reduced(problem=self.reduce_problem)
        if broken:
            return Reduced(problem="timed out", is_late=True)
        return Reduced(max(peer.reduce_s for peer in partners), 1 << 20)

    def gpu_compute(self) -> list[dict[str, float]]:
        self._ask("gpu_compute")
        return [{"matmul": seconds} for seconds in self.gpus_s]

    def nccl_log(self) -> list[str]:
        self._ask("nccl_log")
        return list(self.log)

    def kill(self) -> None:
        self.dies_at = self.asked[-1] if self.asked else "endpoint"

    def close(self) -> None:
        self.is_closed = True


def gang(count: int) -> list[FakePeer]:
    peers = [FakePeer(position) for position in range(count)]
    for peer in peers:
        peer.friends = peers
    return peers
