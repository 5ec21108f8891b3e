"""Watches a rank from within: counts its optimizer steps and times its data loaders, for a program that knows nothing of it.

The runner executes this file in a namespace that no import can find (`runner.py`, observers) and calls `begin(DIRECTORY)`. Standard
library only. torch is never imported from here: when the program imports it, or has it already (a forked rank), the hooks go in. No
thread, because a program that forks beside threads is warned about; no descriptor below those that the program would get anyhow.

A step is counted when an optimizer has stepped (torch's own global hook). Several optimizers: a round ends where one of them steps again,
so generator and discriminator, or an optimizer for each parameter, make one step together, and one that is made anew goes on counting.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal
import sys
from _thread import get_ident
from time import monotonic_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from launcher.node.progress import Page

STACK_SIGNAL = signal.SIGRTMAX - 5
"""Makes the rank write the stacks of its threads into `STACK_FILE`, where py-spy is not to be had. Nobody else uses it by default."""
STACK_FILE = "faulthandler.log"
_FIRST_FD = 400

_STEPS, _LOADERS, _BACKWARD = "torch.optim.optimizer", "torch.utils.data.dataloader", "torch.autograd"
_PROCESSES = "multiprocessing.process"
W_PID, W_BEGAN_NS, W_WAIT_SINCE_NS, W_BATCHES, W_BATCH_AT_NS = (
    1,
    2,
    3,
    5,
    6,
)  # as in progress.py; globals are faster than attributes


class Observer:
    """What is known of this process. Its methods run inside the program: they must be quick and must not fail."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._words = page.words
        self._is_on = True
        self._number = 0
        self._steps = 0
        self._step_at_ns = 0
        self._round: set[int] = set()
        self._waited_ns = 0
        self._batches = 0
        self._source = 0
        self._samples_ahead = 0
        self._samples = 0
        self._own_ns = 0
        self._is_ahead = False
        """Since the last step nobody has called backward: what takes time now is this rank's own."""
        self._main_thread = get_ident()

    def stop(self) -> None:
        """In a forked child, which is not the rank."""
        self._is_on = False

    def on_step(self, optimizer: object, args: object, kwargs: object) -> None:
        """torch's global post hook."""
        key = id(optimizer)
        if key in self._round:
            self._round.clear()
        elif self._round:
            self._round.add(key)
            return
        self._round.add(key)
        if not self._is_on:
            return
        now_ns = monotonic_ns()
        took_ns = now_ns - self._step_at_ns if self._step_at_ns else 0
        self._step_at_ns = now_ns
        self._number += 1
        self._steps += 1
        self._samples += self._samples_ahead
        self._samples_ahead = 0
        self._page.write_record(
            self._number, self._steps, now_ns, took_ns, self._waited_ns, self._samples, self._own_ns
        )
        self._is_ahead = True

    def wrap_backward(self, original: Callable[..., Any]) -> Any:
        """`torch.autograd.backward`: where a rank begins to wait for the others."""

        def backward(*args: Any, **kwargs: Any) -> Any:
            if self._is_ahead:
                self._is_ahead = False
                self._own_ns += monotonic_ns() - self._step_at_ns
            return original(*args, **kwargs)

        return _dressed(backward, original)

    def wrap_next(self, original: Callable[[Any], Any]) -> Any:
        """`__next__` of torch's loader iterators, timed. Waits of other threads (somebody's own prefetching) are not waits of training."""
        words = self._words

        def timed_next(self_: Any) -> Any:
            if not self._is_on or words[W_WAIT_SINCE_NS]:  # a loader that reads from another one
                return original(self_)
            is_main = get_ident() == self._main_thread
            began_ns = monotonic_ns()
            if is_main:
                words[W_WAIT_SINCE_NS] = began_ns
            try:
                batch = original(self_)
            finally:
                ended_ns = monotonic_ns()
                if is_main:
                    words[W_WAIT_SINCE_NS] = 0
                    self._waited_ns += ended_ns - began_ns
            self._count_batch(self_, ended_ns)
            return batch

        return _dressed(timed_next, original)

    def _count_batch(self, iterator: Any, at_ns: int) -> None:
        self._batches += 1
        self._words[W_BATCHES] = self._batches
        self._words[W_BATCH_AT_NS] = at_ns
        if id(iterator) != self._source:  # batches of an evaluation belong to no step
            self._source = id(iterator)
            self._samples_ahead = 0
        size = getattr(getattr(iterator, "_index_sampler", None), "batch_size", None)
        if type(size) is int:
            self._samples_ahead += size


def _dressed(function: Any, original: Any) -> Any:
    """As functools.wraps, which would have to be imported."""
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(function, name, getattr(original, name, None))
    function.__wrapped__ = original
    return function


# A compiler of the program's code (torch.compile over a whole step) calls what is ours as it is, and does not look into it.
for _method in (Observer.on_step, Observer._count_batch):
    vars(_method).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=None)


class _WhenImported:
    """A finder that finds nothing itself: after one of its modules is executed, calls what is due. It leaves no trace in the module."""

    def __init__(self, due: dict[str, Callable[[Any], None]]) -> None:
        self._due = due

    def install(self) -> None:
        for name in list(self._due):
            module = sys.modules.get(name)
            # A forked rank has it; in mid-import (another thread's) it is not whole yet.
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self._call(name, module)
        if self._due:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._due:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if getattr(spec.loader, "exec_module", None) is not None:
                    spec.loader = _Loader(spec.loader, self._call, name)
                return spec
        return None

    def _call(self, name: str, module: Any) -> None:
        then = self._due.pop(name, None)
        if then is not None:
            try:
                then(module)
            except Exception as error:
                print(f"launcher: {name} goes unobserved: {type(error).__name__}: {error}", file=sys.stderr)
        if not self._due and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Loader:
    """Stands before a module's loader for the moment of its execution."""

    def __init__(self, loader: Any, then: Callable[[str, Any], None], name: str) -> None:
        self._loader, self._then, self._name = loader, then, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._loader, attribute)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then(self._name, module)


def begin(directory: str) -> Observer:
    """Opens the page of this rank and hooks into whatever of torch there is or will be. Raises OSError or ValueError without a page."""
    observer = Observer(_open_page(directory))
    observer._words[W_BEGAN_NS] = monotonic_ns()
    observer._words[W_PID] = os.getpid()
    os.register_at_fork(after_in_child=observer.stop)

    def hook_steps(module: Any) -> None:
        module.register_optimizer_step_post_hook(observer.on_step)

    def hook_loaders(module: Any) -> None:
        module._BaseDataLoaderIter.__next__ = observer.wrap_next(module._BaseDataLoaderIter.__next__)

    def hook_backward(module: Any) -> None:
        module.backward = observer.wrap_backward(module.backward)

    def keep_sockets_here(module: Any) -> None:
        # What children of multiprocessing leave in their temporary directory when they are killed is removed with ours (runtime_dir.py).
        module.current_process()._config.setdefault("tempdir", os.readlink(os.path.join(directory, "tmp")))

    due: dict[str, Callable[[Any], None]] = {_STEPS: hook_steps, _LOADERS: hook_loaders, _BACKWARD: hook_backward}
    if os.path.exists(os.path.join(directory, "tmp")):
        due[_PROCESSES] = keep_sockets_here
    _WhenImported(due).install()
    _write_stacks_when_asked(directory)
    return observer


def _open_page(directory: str) -> Page:
    """`progress.py` lies beside us and is executed as we are, so that no module of ours is anywhere to be found."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "progress.py")
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    namespace: dict[str, Any] = {"__name__": "_railhead_progress", "__file__": path}
    exec(code, namespace)
    page: Page = namespace["open_page"](directory, writable=True)
    return page


def _write_stacks_when_asked(directory: str) -> None:
    """Best effort: without it, stacks come from py-spy alone."""
    try:
        fd = os.open(os.path.join(directory, STACK_FILE), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            high_fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
        finally:
            os.close(fd)
        faulthandler.register(STACK_SIGNAL, file=high_fd, all_threads=True)
    except (OSError, ValueError, RuntimeError):
        pass
