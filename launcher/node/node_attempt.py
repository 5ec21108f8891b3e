"""One attempt on one node: its store host, its ranks, from the first process to the last descendant. Owned by the agent's loop."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from launcher.errors import NodeError
from launcher.gang import rank_env
from launcher.gang.causes import exception_line, unheard_exception
from launcher.gang.events import (
    AttemptPlan,
    Event,
    ExitStatus,
    NodeFailed,
    Notice,
    RankExited,
    RanksStarted,
    StoreAddress,
    StoreOpened,
)
from launcher.gang.observations import NodeProgress, RankStack, StacksTaken
from launcher.gang.rank_env import RankPlaces, Setting
from launcher.gang.world import Member, NodeInfo
from launcher.node import stacks, store
from launcher.node.deafness import PATIENCE_S, Hearing
from launcher.node.failure import Left, last_lines, read_exception, what_was_left
from launcher.node.follow import LogFollower, Source
from launcher.node.forking import ForkServer
from launcher.node.forkservers import ForkServers
from launcher.node.guarded import Exited, Gone, GuardedProcess, NeverBorn, Report, Started, StartFailed
from launcher.node.memory_kills import MemoryKills
from launcher.node.nccl_logs import NcclLogs, NcclPaths
from launcher.node.pages import RankPage, is_stopped
from launcher.node.rank_process import RankFiles, RankStarter
from launcher.node.runtime_dir import RuntimeDir, remove
from launcher.node.survey import Survey
from launcher.preemption import MARKER
from launcher.spec import JobSpec, ProgramKind, Stream

_DRAIN_S = 0.2
"""How long the news of a rank's end may wait for its last shown lines, so that they stand before the report. More, and a stuck terminal
would delay the stop of the others."""

_SLOW_END_S = 3.0
"""A rank that has raised an exception is gone in less than a second, unless its clean-up takes long."""

ProveFree = Callable[[Collection[int], Callable[[str], None]], None]
"""Calls back in the agent's loop when the GPU memory of these dead processes is free, or with what is held all the same."""
Watch = Callable[[GuardedProcess, Callable[[Report], None]], None]


class NodeAttempt:
    """Reports through `on_event`; calls `when_over` once, after `stop`, when nothing of it is alive."""

    def __init__(
        self,
        number: int,
        node: NodeInfo,
        spec: JobSpec,
        run_dir: str,
        base_env: Mapping[str, str],
        on_event: Callable[[Event], None],
        follower: LogFollower,
        watch: Watch,
        forks: ForkServers,
        runtime_dir: RuntimeDir,
        prove_gpus_free: ProveFree | None,
        is_sweeping: Callable[[], bool],
        when_over: Callable[[int], None],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """post: calls something in the agent's loop, from any thread."""
        self.number = number
        self._node = node
        self._spec = spec
        self._run_dir = run_dir
        self._base_env = base_env
        self._on_event = on_event
        self._follower = follower
        self._watch = watch
        self._forks = forks
        self._runtime_dir = runtime_dir
        self._prove_gpus_free = prove_gpus_free
        self._temporary: dict[int, str] = {}
        self._is_sweeping = is_sweeping
        self._when_over = when_over
        self._post = post
        self._directory = os.path.join(run_dir, f"attempt_{number}")
        self._store: GuardedProcess | None = None
        self._ranks: dict[int, GuardedProcess] = {}
        self._pages: dict[int, RankPage] = {}
        self._files: dict[int, RankFiles] = {}
        self._memory_kills = MemoryKills()
        self._has_told_of_unheard = False
        self._num_to_start = 0
        self._pids: dict[int, int] = {}
        self._start_failures: dict[int, StartFailed] = {}
        self._nccl_logs: NcclLogs | None = None
        self._is_stopping = False
        self._can_save = False
        self._hearing: Hearing | None = None
        self._is_over = False
        self._is_proving = False
        self._told_of_ending: set[int] = set()

    # --- commands -------------------------------------------------------------------------------------------------------------------

    def open_store(self) -> None:
        if self._is_stopping:
            return
        log_path = os.path.join(self._directory, "store.log")
        with contextlib.suppress(OSError):
            os.makedirs(self._directory, exist_ok=True)
        try:
            listener, address = store.bind(self._node.addr, self._spec.master_port)
            with listener:
                self._host_store(listener.dup(), address, log_path, self._forks.current)
        except (NodeError, OSError) as error:
            self._fail(str(error))
            return
        self._on_event(StoreOpened(self.number, self._node.node_id, address))

    def start_ranks(self, plan: AttemptPlan, cache_socket: str | None, survey: Survey) -> None:
        if self._is_stopping:
            return
        members = plan.world.members_of(self._node.node_id)
        paths = NcclPaths(self._directory, self._node.node_id)
        advice = survey.advice(len(plan.world.nodes), len(members), paths)
        self._num_to_start = len(members)
        try:
            for member in members:
                files = RankFiles(self._rank_directory(member.rank))
                places = RankPlaces(self._run_dir, files.error_file, cache_socket)
                chosen = rank_env.settings(self._spec, plan, member, places, self._base_env, advice.environment)
                self._make_room(files)
                self._temporary[member.rank] = self._runtime_dir.make_for_rank(files.directory)
                self._pages[member.rank] = RankPage(member.rank, files.directory)
                account = rank_env.account(chosen, self._base_env, advice.environment, member.local_rank)
                self._start_rank(member, files, chosen, account, advice.binding_of(member.local_rank))
                self._follow(member, files)
        except (NodeError, OSError) as error:
            self._fail(f"rank {member.rank} could not be started: {error}")
        if advice.transport:
            self._nccl_logs = NcclLogs(
                self.number,
                self._node.hostname,
                advice.transport,
                paths,
                [files.stdout_log for files in self._files.values()],
                self._on_event,
            )

    def look_at_nccl(self, is_last: bool = False) -> None:
        """What carries the traffic between nodes, where NCCL's logs can prove it."""
        if self._nccl_logs is not None:
            self._nccl_logs.look(time.monotonic(), is_last)

    def progress(self) -> NodeProgress | None:
        """How far the ranks are that are alive here; None while nothing runs."""
        samples = tuple(
            self._pages[rank].sample(process.pid)
            for rank, process in sorted(self._ranks.items())
            if process.pid and process.status is None
        )
        return NodeProgress(self.number, self._node.node_id, time.time(), samples) if samples else None

    def look_at_endings(self) -> None:
        """Says so once of a rank that has raised an exception and does not end (a clean-up that hangs, threads that go on): its end is what
        would be reported."""
        for rank, process in self._ranks.items():
            if not process.pid or process.status is not None or rank in self._told_of_ending:
                continue
            files = self._files[rank]
            exception = read_exception(files.error_file)
            if exception is not None and time.time() > exception.at_s + _SLOW_END_S:
                self._told_of_ending.add(rank)
                words = f"rank {rank} has raised {exception_line(exception, 200)}, and its process has not ended yet"
                self._on_event(Notice(f"{words}; log {files.stderr_log}", self._node.node_id))

    def take_stacks(self, look: int, is_final: bool) -> None:
        """Where the ranks stand. Returns at once; StacksTaken follows."""
        pids = self._live_pids()

        def tell(taken: tuple[RankStack, ...]) -> None:
            self._on_event(StacksTaken(self.number, self._node.node_id, look, taken, is_final))

        if pids:
            stacks.take(pids, self._directory, is_final, tell)

    def _start_rank(
        self,
        member: Member,
        files: RankFiles,
        chosen: Sequence[Setting],
        account: Mapping[str, object],
        bind: Mapping[str, object] | None,
    ) -> None:
        self._start_rank_from(self._forks.for_ranks(), member, files, chosen, account, bind)

    def _start_rank_from(
        self,
        server: ForkServer | None,
        member: Member,
        files: RankFiles,
        chosen: Sequence[Setting],
        account: Mapping[str, object],
        bind: Mapping[str, object] | None,
        afresh: str = "",
    ) -> None:
        starter = RankStarter(self._spec.program, self._spec.cwd, server, self._forks.why_not)
        env = rank_env.apply(chosen, self._base_env)
        process, how = starter.start(member, env, files, bind, afresh=afresh, with_modules=self._forks.wants_modules)
        files.write_environment({"started": how, **account})

        def again() -> None:
            """The fork server has died before it was forked. If that was the better one in the making, there is another."""
            other = self._forks.current if self._forks.current is not server else None
            why = "" if other is not None else "the fork server died before it was forked"
            self._start_rank_from(other, member, files, chosen, account, bind, why)

        self._ranks[member.rank] = process
        self._files[member.rank] = files
        self._watch(process, partial(self._rank_reports, member, files, again))

    def stop(self, grace_s: float, signum: int, can_save: bool = False) -> None:
        self._is_stopping, self._can_save = True, can_save
        if not can_save and grace_s > PATIENCE_S and self._hearing is None:
            self._hearing = Hearing(self._live_pids(), signum)
        for rank, process in self._ranks.items():
            if not can_save and (self._saves_itself(rank) or (process.pid and is_stopped(process.pid))):
                process.stop(0.0, signal.SIGKILL)
            else:
                process.stop(grace_s, signum)
        self._check_over()

    def _saves_itself(self, rank: int) -> bool:
        """It uses `launcher.preemption`."""
        return os.path.exists(os.path.join(self._rank_directory(rank), MARKER))

    @property
    def hearing_due_s(self) -> float | None:
        """When `look_who_hears` has something to do."""
        return self._hearing.due_s if self._hearing is not None else None

    def look_who_hears(self) -> None:
        """A while after the signal: ranks that cannot have heard it, and will not, do not get the rest of the grace."""
        hearing = self._hearing
        if hearing is None or hearing.due_s is None or time.monotonic() < hearing.due_s:
            return
        suspects = {rank: pid for rank, pid in hearing.suspects().items() if pid in self._live_pids().values()}
        if suspects:
            stacks.take(
                suspects, self._directory, False, lambda taken: self._post(lambda: self._end_deaf(hearing.deaf(taken)))
            )

    def _end_deaf(self, ranks: Sequence[int]) -> None:
        deaf = [rank for rank in ranks if rank in self._ranks and self._ranks[rank].status is None]
        if not deaf:
            return
        who = f"rank {deaf[0]} waits" if len(deaf) == 1 else f"ranks {', '.join(map(str, deaf))} wait"
        where = "in a collective that a dead rank has left, where Python runs no signal handler"
        text = f"{who} {where}: SIGKILL, without the rest of the grace"
        self._on_event(Notice(text, self._node.node_id))
        for rank in deaf:
            self._ranks[rank].stop(0.0, signal.SIGKILL)

    def _live_pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self._ranks.items() if process.pid and process.status is None}

    def _rank_directory(self, rank: int) -> str:
        return os.path.join(self._directory, f"rank_{rank}")

    def strays_are_gone(self) -> None:
        """What a killed guardian left behind has been ended."""
        self._check_over()

    # --- ranks ----------------------------------------------------------------------------------------------------------------------

    def _make_room(self, files: RankFiles) -> None:
        try:
            os.makedirs(files.directory, exist_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def _follow(self, member: Member, files: RankFiles) -> None:
        logs = self._spec.logs
        shown = logs.shown(member.rank, member.local_rank)
        prefix = self._spec.line_prefix(member.rank, member.local_rank).encode()
        for stream, path, filters, filtered in (
            (Stream.STDOUT, files.stdout_log, logs.duplicate_stdout_filters, "filtered_stdout.log"),
            (Stream.STDERR, files.stderr_log, logs.duplicate_stderr_filters, "filtered_stderr.log"),
        ):
            if stream in shown and os.path.exists(path):
                duplicate_path = os.path.join(self._directory, filtered) if filters else ""
                needles = tuple(needle.encode() for needle in filters)
                note = files.traceback_note if stream is Stream.STDERR else ""
                self._follower.follow(
                    Source(member.rank, member.local_rank, stream, path, needles, duplicate_path, prefix, note)
                )

    def find_modules_file(self) -> str | None:
        """Where a rank has written down what it imported, if one has."""
        return next((files.modules_file for files in self._files.values() if os.path.exists(files.modules_file)), None)

    def _rank_reports(self, member: Member, files: RankFiles, again: Callable[[], None], report: Report) -> None:
        match report:
            case NeverBorn() if self._is_stopping:
                self._rank_is_gone(
                    member.rank
                )  # the word to stop has gone with it: started again, nobody would ever stop it
            case NeverBorn():
                try:
                    again()
                except OSError as error:
                    del self._ranks[member.rank]
                    self._fail(f"rank {member.rank} could not be started: {error}")
                    self._check_over()
            case Started(pid=pid):
                self._pids[member.local_rank] = pid
                if len(self._pids) == self._num_to_start:
                    pids = tuple(self._pids[local_rank] for local_rank in sorted(self._pids))
                    self._on_event(RanksStarted(self.number, self._node.node_id, pids, time.time()))
            case StartFailed():
                self._start_failures[member.rank] = report
            case Exited(status=status, at_s=at_s):
                self._rank_exited(member, files, status, at_s)
            case Gone():
                self._rank_is_gone(member.rank)

    def _rank_is_gone(self, rank: int) -> None:
        del self._ranks[rank]
        self._pages.pop(rank).close()
        remove(self._temporary.pop(rank, ""))
        self._check_over()

    def _rank_exited(self, member: Member, files: RankFiles, status: ExitStatus, at_s: float) -> None:
        if self._spec.logs.shown(member.rank, member.local_rank):
            # While ranks may save, what goes wrong is not reported as a failure: then its traceback is all that is shown of it.
            self._follower.release(files.stderr_log, is_told=not (self._is_stopping and self._can_save))
            self._follower.drain(_DRAIN_S)
        pid = self._pids.get(member.local_rank, 0)
        left = Left()
        if member.rank in self._start_failures:
            failure = self._start_failures[member.rank]
            left = Left(words=failure.reason)
            status = ExitStatus(code=127 if failure.errno == errno.ENOENT else 126)  # as a shell says it
        elif not status.is_success:
            is_python = self._spec.program.kind is not ProgramKind.EXECUTABLE
            left = what_was_left(
                status, files.traces, pid, self._memory_kills, is_stopping=self._is_stopping, is_python=is_python
            )
        elif (unheard := unheard_exception(last_lines(files.stderr_log, 60))) and not self._has_told_of_unheard:
            self._has_told_of_unheard = True  # of one rank: what one has, others have too
            text = f"rank {member.rank} ended with exit code 0 all the same: {unheard}; log {files.stderr_log}"
            self._on_event(Notice(text, self._node.node_id))
        self._on_event(
            RankExited(
                self.number,
                self._node.node_id,
                member.rank,
                member.local_rank,
                pid,
                status,
                at_s,
                files.stdout_log,
                files.stderr_log,
                left.exception,
                left.words,
                left.cause,
                left.out_of_memory,
                self._pages[member.rank].steps(),
                was_told=self._can_save and not self._saves_itself(member.rank),
            )
        )

    # --- the store and the end --------------------------------------------------------------------------------------------------------

    def _host_store(
        self, listener: socket.socket, address: StoreAddress, log_path: str, server: ForkServer | None
    ) -> None:
        try:
            log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError:
            log_fd = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._store = store.start_host(listener, address, self._base_env, log_fd, server)
        finally:
            os.close(log_fd)
        self._watch(self._store, partial(self._store_reports, listener, address, log_path))

    def _store_reports(self, listener: socket.socket, address: StoreAddress, log_path: str, report: Report) -> None:
        match report:
            case NeverBorn() if not self._is_stopping or self._ranks:  # ranks that save may need it
                self._host_store(listener, address, log_path, None)
            case Started():
                listener.close()  # it has its own; ours was for the case that the fork server dies first
            case StartFailed(reason=reason):
                listener.close()
                self._fail(f"the gang's store could not be started: {reason}")
            case Exited(status=status) if not self._is_stopping:
                listener.close()
                words = last_lines(log_path, 3)
                self._fail(f"the host of the gang's store ended with {status}" + (f": {words}" if words else ""))
            case Gone() | NeverBorn():
                listener.close()
                self._store = None
                self._check_over()

    def _fail(self, reason: str) -> None:
        self._on_event(NodeFailed(self.number, self._node.node_id, reason, time.time()))

    def _check_over(self) -> None:
        """The store goes last: ranks in their grace may still need it (a checkpoint with a barrier)."""
        if self._is_over or not self._is_stopping or self._ranks:
            return
        if self._store is not None:
            self._store.stop(0.0)
        elif not self._is_sweeping():
            if self._prove_gpus_free is not None and self._pids:
                prove, self._prove_gpus_free = self._prove_gpus_free, None
                self._is_proving = True
                prove(frozenset(self._pids.values()), self._gpus_are_free)
            if not self._is_proving:
                self._is_over = True
                self._when_over(self.number)

    def _gpus_are_free(self, held: str) -> None:
        """Or have been waited for long enough: then `held` says what is not."""
        self._is_proving = False
        if held:
            text = f"GPU memory is not free although all ranks have ended, the next attempt may run out of it: {held}"
            self._on_event(Notice(text, self._node.node_id))
        self._check_over()
