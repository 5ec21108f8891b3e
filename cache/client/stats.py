"""What reading cost one process: counted on the hot path, so plain additions and nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class ReaderStats:
    """Totals of one process since it started (or was forked). Several threads may lose a count now and then; bytes are never affected.

    hits: reads from resident blocks, without a request. misses: reads that waited for the daemon. direct_reads: reads from the origin
    past the daemon. *_bytes: the same in bytes. wait_s: seconds waited in misses and direct reads; wait_s_by_cause attributes them
    (docs/cache.md lists the causes).
    """

    hits: int = 0
    misses: int = 0
    direct_reads: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    direct_bytes: int = 0
    wait_s: float = 0.0
    wait_s_by_cause: dict[str, float] = field(default_factory=dict)

    def waited(self, seconds: float, cause: str) -> None:
        self.wait_s += seconds
        self.wait_s_by_cause[cause] = self.wait_s_by_cause.get(cause, 0.0) + seconds

    @property
    def hit_ratio(self) -> float:
        reads = self.hits + self.misses + self.direct_reads
        return self.hits / reads if reads else 0.0

    def flat(self) -> dict[str, float]:
        """All numbers in one dictionary, causes as `wait_s:<cause>`."""
        data = asdict(self)
        causes = data.pop("wait_s_by_cause")
        return {**data, **{f"wait_s:{cause}": seconds for cause, seconds in causes.items()}}
