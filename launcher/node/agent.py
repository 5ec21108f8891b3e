"""One node's part of the gang: hosts the store if asked, starts ranks, watches them, stops them, follows their output, runs the cache.

A plain class: in the launcher's process on one machine, inside an actor on Ray. It decides nothing about the gang; it
reports facts and does what it is told. Commands return at once; the work is done by one loop in a thread of the agent's
own (nothing else touches processes), and output is followed by another, so that a slow terminal never delays the news
of a failure.
"""

from __future__ import annotations

import collections
import contextlib
import os
import selectors
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from functools import partial

from launcher.gang.events import (
    AttemptEnded,
    AttemptPlan,
    CacheFailed,
    Event,
    ModulesLearnt,
    NodeFailed,
    NodeLost,
    Notice,
    Output,
    OutputEnded,
)
from launcher.gang.patience import look_every_s
from launcher.gang.world import NodeInfo
from launcher.node import strays
from launcher.node.cache_child import CacheChild
from launcher.node.cache_peers import PeerTerms
from launcher.node.follow import LogFollower
from launcher.node.forkservers import ForkServers
from launcher.node.gpu_memory import GpuProof
from launcher.node.guarded import Gone, GuardedProcess, NeverBorn, Report
from launcher.node.node_attempt import NodeAttempt
from launcher.node.runtime_dir import RuntimeDir
from launcher.node.survey import Survey, is_needed
from launcher.spec import JobSpec

_CLOSE_TIMEOUT_S = 8.0
_CACHE_AGAIN_MAX_S = 60.0
"""A cache daemon that keeps dying is started again more and more seldom: after 1, 2, 4 … s, and then once a minute."""
_DISK_CHECK_S = 5.0
_EAGER_S, _EAGERLY_EVERY_S = 60.0, 0.05
"""For so long after an attempt's start it is looked so often whether a rank has told what it imported: it may die at any moment."""
_STRAY_SWEEP_S = 0.5
"""After a guardian's death, strays appear as the kernel kills their parents: sweep until there was none for this long."""


class NodeAgent:
    """Same contract as `cluster.ports.NodeHandle` for its commands (any thread may call them; none blocks or raises).

    node: who we are. run_dir: existing directory for logs and records. base_env: environment that ranks start from (usually
    `os.environ` of the agent's process). on_event must not block; on_log may, and while it does the ranks' files are not read on.
    Both are called from threads of the agent. cache_key: what the job's cache daemons believe each other by; None: they have no peers.
    """

    def __init__(
        self,
        node: NodeInfo,
        spec: JobSpec,
        run_dir: str,
        base_env: Mapping[str, str],
        on_event: Callable[[Event], None],
        on_log: Callable[[Output], None],
        cache_key: str | None = None,
    ) -> None:
        """Starts the agent's threads and, if the spec asks for it, the cache daemon (CacheServing or CacheFailed will follow)."""
        self._node = node
        self._spec = spec
        self._run_dir = os.path.abspath(run_dir)
        self._base_env = {**base_env, **spec.env}
        self._on_event = on_event
        self._follower = LogFollower(on_log)
        self._attempt: NodeAttempt | None = None
        self._ended: set[int] = set()
        self._survey = Survey(node, spec, self._base_env, on_event)
        self._cache: CacheChild | None = None
        self._cache_socket: str | None = None
        """Where its ranks find it, also while it is being started again."""
        self._cache_again_at_s: float | None = None
        self._num_cache_deaths = 0
        self._peer_terms = PeerTerms(cache_key, node.addr) if cache_key is not None else None
        self._peers: tuple[str, ...] = ()
        """Addresses of the job's cache daemons, as last told."""
        self._sweep_until_s = 0.0
        self._next_disk_check_s = 0.0
        self._has_told_of_disk = False
        self._next_progress_s = 0.0
        self._progress_every_s = look_every_s(spec.hang_timeout_s)
        self._eager_until_s = 0.0
        self._is_closing = False
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._watched: set[GuardedProcess] = set()
        self._commands_lock = threading.Lock()
        self._is_over = False
        self._selector = selectors.DefaultSelector()
        self._wake_fd, self._wake_write_fd = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._wake_write_fd, False)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._drain_wake)
        strays.adopt()
        self._runtime_dir = RuntimeDir()
        self._gpu_proof = GpuProof()
        self._forks = ForkServers(spec, node.num_ranks, self._run_dir, self._base_env, self._on_fork_socket)
        self._post(self._forks.start)
        self._thread = threading.Thread(target=self._run, name=f"agent-{node.node_id}", daemon=True)
        self._thread.start()
        if is_needed(spec, spec.max_nodes):
            self._survey.begin()
        if spec.cache is not None:
            self._post(self._start_cache)

    # --- commands -------------------------------------------------------------------------------------------------------------------

    def open_store(self, attempt: int) -> None:
        """Binds a port for a fresh TCPStore and starts its host. Answered by StoreOpened or NodeFailed."""
        self._post(lambda: self._begin(attempt, NodeAttempt.open_store))

    def start_ranks(self, plan: AttemptPlan) -> None:
        """Answered by RanksStarted or NodeFailed; later a RankExited for each rank."""
        num_nodes = len(plan.world.nodes)

        def start(attempt: NodeAttempt) -> None:
            attempt.start_ranks(plan, self._cache_socket, self._survey)

        def start_then_look() -> None:
            self._begin(plan.attempt, start)
            self._survey.begin()

        if is_needed(self._spec, num_nodes):
            self._survey.when_over(lambda: self._post(lambda: self._begin(plan.attempt, start)))
        else:
            self._post(start_then_look)

    def stop_attempt(self, attempt: int, grace_s: float, signum: int, can_save: bool = False) -> None:
        """The signal, grace, SIGKILL. Answered by exactly one AttemptEnded, when nothing of the attempt is alive here; its last output
        may come later, behind a slow terminal."""
        self._post(lambda: self._stop(attempt, grace_s, signum, can_save))

    def share_imports(self, names: tuple[str, ...]) -> None:
        """Ranks on another node have imported these modules: should ranks ever start here, they find them in memory."""
        self._post(lambda: self._forks.learn_names(names))

    def share_cache(self, addresses: tuple[str, ...]) -> None:
        """These are the addresses of the job's cache daemons now, HOST:PORT each, this node's among them."""

        def tell() -> None:
            self._peers = addresses
            if self._cache is not None:
                self._cache.tell_peers(addresses)

        self._post(tell)

    def take_stacks(self, attempt: int, look: int, is_final: bool) -> None:
        """Answered by StacksTaken when the stacks are on disk."""

        def take() -> None:
            if self._attempt is not None and self._attempt.number == attempt:
                self._attempt.take_stacks(look, is_final)

        self._post(take)

    def close(self) -> None:
        """Kills what is left of any attempt, drains the cache daemon (2 s), ends the threads. Blocks at most some seconds; idempotent."""
        self._post(self._begin_closing)
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._follower.close()

    # --- the loop -------------------------------------------------------------------------------------------------------------------

    def _post(self, command: Callable[[], None]) -> None:
        with self._commands_lock:
            if not self._is_over:  # or we would write into whatever has the descriptor's number now
                self._commands.append(command)
                with contextlib.suppress(BlockingIOError):  # full: it is awake anyway
                    os.write(self._wake_write_fd, b"x")

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_fd, 4096)

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:
            # Nobody would look after the processes any more. Their guardians take the end of the socket for our death and end them.
            for process in self._watched:
                process.close()
            text = "".join(traceback.format_exception(error))
            self._on_event(NodeLost(self._node.node_id, f"a fault in the launcher's agent there:\n{text}", time.time()))
        finally:
            self._forks.close()
            self._runtime_dir.close()
            with self._commands_lock:
                self._is_over = True
                self._selector.close()
                os.close(self._wake_fd)
                os.close(self._wake_write_fd)

    def _loop(self) -> None:
        while not (self._is_closing and self._is_idle()):
            for key, _ in self._selector.select(self._timeout_s()):
                key.data()
            while self._commands:
                self._commands.popleft()()
            self._sweep()
            if self._cache is not None:
                self._cache.check_deadline(time.monotonic())
            elif self._cache_again_at_s is not None and time.monotonic() >= self._cache_again_at_s:
                self._start_cache()
            self._check_disk()
            self._look_at_progress()
            if self._attempt is not None:
                self._attempt.look_who_hears()
            self._look_after_forks()

    def _on_fork_socket(self, channel: socket.socket, handler: Callable[[], None] | None) -> None:
        if handler is None:
            self._selector.unregister(channel)
        else:
            self._selector.register(channel, selectors.EVENT_READ, handler)

    def _look_after_forks(self) -> None:
        self._forks.check_deadlines()
        if self._attempt is not None and self._forks.wants_modules:
            found = self._attempt.find_modules_file()
            if found is not None:
                names = self._forks.learn(found)
                if names and self._spec.max_nodes + self._spec.spare_nodes > 1:
                    self._on_event(ModulesLearnt(self._node.node_id, names))

    def _is_idle(self) -> bool:
        return self._attempt is None and self._cache is None and self._sweep_until_s == 0.0

    def _timeout_s(self) -> float | None:
        if self._sweep_until_s:
            return 0.02
        deadlines_s = []
        if self._cache is not None and not self._cache.has_announced:
            deadlines_s.append(self._cache.deadline_s + 0.01)
        if self._cache_again_at_s is not None:
            deadlines_s.append(self._cache_again_at_s + 0.01)
        if self._attempt is not None:  # the disk is looked at on the same occasion, and what ranks have imported
            deadlines_s.append(self._next_progress_s)
            if self._attempt.hearing_due_s is not None:
                deadlines_s.append(self._attempt.hearing_due_s)
            if self._forks.wants_modules and time.monotonic() < self._eager_until_s:
                deadlines_s.append(time.monotonic() + _EAGERLY_EVERY_S)
        if self._forks.is_warming:
            deadlines_s.append(time.monotonic() + _DISK_CHECK_S)
        return max(0.0, min(deadlines_s) - time.monotonic()) if deadlines_s else None

    def _look_at_progress(self) -> None:
        now = time.monotonic()
        if self._attempt is not None and now >= self._next_progress_s:
            self._next_progress_s = now + self._progress_every_s
            progress = self._attempt.progress()
            if progress is not None:
                self._on_event(progress)
            self._attempt.look_at_nccl()
            self._attempt.look_at_endings()

    def _sweep(self) -> None:
        now = time.monotonic()
        if self._sweep_until_s and not strays.kill():
            self._sweep_until_s = now + _STRAY_SWEEP_S
        elif self._sweep_until_s and now >= self._sweep_until_s:
            self._sweep_until_s = 0.0
            if self._attempt is not None:
                self._attempt.strays_are_gone()

    def _check_disk(self) -> None:
        """Says once that output is being lost. (Ranks write into their files themselves, so nobody sees their writes fail.)"""
        now = time.monotonic()
        if self._attempt is not None and not self._has_told_of_disk and now >= self._next_disk_check_s:
            self._next_disk_check_s = now + _DISK_CHECK_S
            with contextlib.suppress(OSError):
                disk = os.statvfs(self._run_dir)
                if disk.f_bavail == 0:
                    self._has_told_of_disk = True
                    text = f"the disk of {self._run_dir} is full: output is being lost, the job goes on"
                    self._on_event(Notice(text, self._node.node_id))

    def _watch(self, process: GuardedProcess, handle: Callable[[Report], None]) -> None:
        """Calls `handle` with each report of the process until it is gone."""
        self._watched.add(process)
        self._selector.register(process.socket, selectors.EVENT_READ, partial(self._read, process, handle))

    def _read(self, process: GuardedProcess, handle: Callable[[Report], None]) -> None:
        for report in process.read():
            if isinstance(report, Gone | NeverBorn):
                self._selector.unregister(process.socket)
                process.close()
                self._watched.discard(process)
                if isinstance(report, Gone) and report.guardian_died:
                    self._sweep_until_s = time.monotonic() + _STRAY_SWEEP_S
            handle(report)

    # --- attempts -------------------------------------------------------------------------------------------------------------------

    def _begin(self, attempt: int, then: Callable[[NodeAttempt], None]) -> None:
        """Carries out a command of this attempt, making it if this is its first."""
        if self._attempt is not None and self._attempt.number != attempt:
            reason = f"attempt {attempt} was to start while attempt {self._attempt.number} is still alive on this node"
            self._on_event(NodeFailed(attempt, self._node.node_id, reason, time.time()))
            return
        if attempt in self._ended or self._is_closing:
            return
        if self._attempt is None:
            self._eager_until_s = time.monotonic() + _EAGER_S
            self._attempt = NodeAttempt(
                attempt,
                self._node,
                self._spec,
                self._run_dir,
                self._base_env,
                self._on_event,
                self._follower,
                self._watch,
                self._forks,
                self._runtime_dir,
                self._prove_gpus_free if self._gpu_proof.is_needed else None,
                is_sweeping=lambda: self._sweep_until_s > 0.0,
                when_over=self._attempt_is_over,
                post=self._post,
            )
        then(self._attempt)

    def _prove_gpus_free(self, pids: Collection[int], then: Callable[[str], None]) -> None:
        self._gpu_proof.wait_until_free(pids, lambda held: self._post(lambda: then(held)))

    def _stop(self, attempt: int, grace_s: float, signum: int, can_save: bool) -> None:
        if self._attempt is not None and self._attempt.number == attempt:
            self._attempt.stop(grace_s, signum, can_save)
        elif attempt not in self._ended:  # it never began here
            self._ended.add(attempt)
            self._on_event(AttemptEnded(attempt, self._node.node_id))
            self._follower.finish(OutputEnded(attempt, self._node.node_id))

    def _attempt_is_over(self, attempt: int) -> None:
        """Nothing of it is alive. Its last output may take longer than the news: the terminal may be slow."""
        self._next_disk_check_s = 0.0
        self._check_disk()  # for an attempt that was shorter than the interval
        self._look_after_forks()
        if self._attempt is not None:
            self._attempt.look_at_nccl(is_last=True)
        self._attempt = None
        self._ended.add(attempt)
        self._on_event(AttemptEnded(attempt, self._node.node_id))
        self._follower.finish(OutputEnded(attempt, self._node.node_id))

    # --- cache ----------------------------------------------------------------------------------------------------------------------

    def _start_cache(self) -> None:
        assert self._spec.cache is not None
        self._cache_again_at_s = None
        if self._peer_terms is not None and not self._peer_terms.can_listen():
            addr = self._peer_terms.addr
            text = (
                f"this node cannot listen at {addr}: its cache takes nothing from other nodes, and gives them nothing"
            )
            self._on_event(Notice(text, self._node.node_id))
            self._peer_terms = None
        try:
            cache = CacheChild(
                self._spec.cache,
                self._node.node_id,
                self._spec.cwd,
                self._base_env,
                os.path.join(self._run_dir, "cache.log"),
                self._on_event,
                self._peer_terms,
                self._peers,
            )
        except OSError as error:
            self._on_event(CacheFailed(self._node.node_id, f"the cache daemon could not be started: {error}"))
            return
        self._cache = cache
        self._cache_socket = cache.socket
        self._selector.register(cache.announce_fd, selectors.EVENT_READ, partial(self._read_cache, cache))
        self._watch(cache.guarded, partial(self._cache_reports, cache))

    def _read_cache(self, cache: CacheChild) -> None:
        if not cache.read_announcement():
            self._selector.unregister(cache.announce_fd)

    def _cache_reports(self, cache: CacheChild, report: Report) -> None:
        cache.handle(report)
        if not cache.is_over:
            return
        if self._is_closing:
            self._forget_cache(cache)
        elif cache.has_served:
            # It worked once, so what ended it (out of memory, a person) need not end the next one; readers go back to it by themselves.
            self._forget_cache(cache)
            delay_s = min(_CACHE_AGAIN_MAX_S, 2.0**self._num_cache_deaths)
            self._num_cache_deaths += 1
            self._cache_again_at_s = time.monotonic() + delay_s
            self._on_event(Notice(f"the cache daemon is started again in {delay_s:g} s", self._node.node_id))

    def _forget_cache(self, cache: CacheChild) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(cache.announce_fd)
        cache.close()
        self._cache = None

    def _begin_closing(self) -> None:
        self._is_closing = True
        self._cache_again_at_s = None
        if self._attempt is not None:
            self._attempt.stop(0.0, signal.SIGKILL)
        if self._cache is not None and self._cache.is_over:
            self._forget_cache(self._cache)
        elif self._cache is not None:
            self._cache.stop()
