"""What is seen of running ranks, as values: how far they are, what they do, where their code stands. Made by agents, judged by `health`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankSample:
    """One rank at one moment. Ages, not times: clocks of two machines need not agree."""

    rank: int
    age_s: float
    """Since its process was seen to start."""
    steps: int | None = None
    """Optimizer steps in this attempt. None: it has not made one, or has no optimizer that we can see: unknown, not zero."""
    step_age_s: float | None = None
    """Since the last step ended."""
    step_s: float | None = None
    """How long the last step took, from the end of the one before."""
    own_s: float = 0.0
    """Time so far between the end of a step and the next call of backward: in it nobody waits for other ranks."""
    waited_s: float = 0.0
    """Time so far that the main thread waited for torch's data loaders; as of the last step."""
    batches: int = 0
    batch_age_s: float | None = None
    waiting_s: float | None = None
    """It is in a data loader's `__next__`, for so long."""
    paused_s: float | None = None
    """It is within `pause_watch()`, for so long."""
    samples: int | None = None
    """Samples that went into its steps, where its loader says its batch size."""
    total_steps: int | None = None
    """As the script has told us: optimizer steps to the end of the job, and how many of them were done before this attempt."""
    done_steps: int = 0
    state: str = "?"
    """Of its main process, as in /proc/PID/stat: R runs, S sleeps, D waits for a device, T is stopped, t is traced by a debugger."""
    cpu_s: float = 0.0
    """CPU time of its main process so far."""
    io_bytes: int = 0
    """Bytes that it has read and written so far, files and pipes."""
    child_cpu_s: float | None = None
    """The same of all that it has started (data loaders, compilers). None: not looked at, because it gets on."""
    child_io_bytes: int | None = None

    @property
    def quiet_s(self) -> float:
        """Since anything was seen of it: a step, a batch, its start."""
        ages = [age for age in (self.step_age_s, self.batch_age_s) if age is not None]
        return min(ages, default=self.age_s)


@dataclass(frozen=True)
class NodeProgress:
    """All ranks of a node that are alive, about once a second while an attempt runs."""

    attempt: int
    node_id: str
    at_s: float
    """Wall clock of the node."""
    samples: tuple[RankSample, ...]


@dataclass(frozen=True)
class RankStack:
    """Where one rank's main thread stands."""

    rank: int
    frames: tuple[str, ...] = ()
    """`function (file:line)`, innermost first; empty when they could not be read."""
    how: str = ""
    """`py-spy`, `faulthandler`, or why there is none."""
    path: str = ""
    """File on the node with the stacks of all its threads."""
    work: str = ""
    """What it is known to take its time for (`work.known_work`); empty if nothing is known."""
    is_import_locked: bool = False
    """It is in an import, and two of its threads wait for each other's (`work.is_import_locked`)."""


@dataclass(frozen=True)
class StacksTaken:
    """Answer to TakeStacks: one for each rank of the node that is alive."""

    attempt: int
    node_id: str
    look: int
    stacks: tuple[RankStack, ...]
    is_final: bool = False
