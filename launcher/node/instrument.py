"""Watches a rank from within: counts its optimizer steps and times its data loaders, for a program that knows nothing of it.

The runner executes this file in a namespace that no import can find (`runner.py`, observers) and calls `begin(DIRECTORY)`. Standard
library only. torch is never imported from here: when the program imports it, or has it already (a forked rank), the hooks go in. No
thread, because a program that forks beside threads is warned about; no descriptor below those that the program would get anyhow.

A step is counted when an optimizer has stepped (torch's own global hook). Several optimizers: a round ends where one of them steps again,
so generator and discriminator, or an optimizer for each parameter, make one step together, and one that is made anew goes on counting.
"""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import os
import signal
import sys
from _thread import get_ident
from time import monotonic, monotonic_ns, sleep

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
_PROCESSES, _GROUPS = "multiprocessing.process", "torch.distributed.distributed_c10d"
# As in progress.py, which cannot be imported here.
W_PID, W_BEGAN_NS = 1, 2
H_STEPS, H_STEP_AT_S, H_STEP_S, H_SAMPLES, H_OWN_S, H_WAIT_BEGAN_S, H_WAIT_ENDED_S, H_WAITED_S = range(8)
H_BATCHES, H_BATCH_AT_S = 8, 9


_WITHIN = -1
"""In place of the number of an iterator: the main thread is within one's `__next__`."""
HOOKS_FILE = "<frozen importlib>/railhead_instrument.py"
"""The file that our hooks say they are from. torch's compiler looks into every function that runs below a compiled one, and would compile
ours with the step, warn of our clock, or end the program because our module is not to be found. It passes by what belongs to importlib (a
list that it has had from its beginning); a mark on a function is heeded only where it is called from compiled code."""


class Observer:
    """What is put into the program, and `stop`. All of it must be quick and must not fail."""

    __slots__ = ("on_step", "stop", "wrap_backward", "wrap_init", "wrap_next")

    on_step: Callable[[object, object, object], None]
    """torch's global post hook."""
    wrap_backward: Callable[[Callable[..., Any]], Any]
    """`torch.autograd.backward`: where a rank begins to wait for the others."""
    wrap_next: Callable[[Callable[[Any], Any]], Any]
    """`__next__` of torch's loader iterators, timed."""
    wrap_init: Callable[[Callable[..., None]], Any]
    """`__init__` of torch's loader iterators."""
    stop: Callable[[], None]
    """In a forked child, which is not the rank."""


def observe(page: Page) -> Observer:
    """The hooks of a rank that writes this page.

    Closures over plain variables, and nothing but the memory's view and one clock is called: between two of our moments the products of
    a step have swept the caches, and what costs is not the instructions but each object, function and library that must be found
    again (a method with attributes, `struct` and a check sum took 1.3 µs warm and 10 µs there; decisions/0094). Numbers are floats,
    which are added without a call and stored as they are.
    """
    now: Callable[[], float] = monotonic
    hot, thread, main_thread = page.hot, get_ident, get_ident()
    # Numbers of the words, as constants of this function's cells: a global is two look-ups more.
    h_steps, h_step_at, h_took, h_samples, h_own = H_STEPS, H_STEP_AT_S, H_STEP_S, H_SAMPLES, H_OWN_S
    h_wait_began, h_wait_ended, h_waited = H_WAIT_BEGAN_S, H_WAIT_ENDED_S, H_WAITED_S
    h_batches, h_batch_at = H_BATCHES, H_BATCH_AT_S
    steps = samples = own_s = waited_s = batches = step_at_s = 0.0
    pacer = source = batch_size = samples_ahead = 0
    """`pacer`: the optimizer that was counted last. `source`: the iterator that gave the main thread its last batch, or _WITHIN."""
    others: set[int] = set()
    """Optimizers that have stepped since."""
    is_ahead = False
    """Since the last step nobody has called backward: what takes time now is this rank's own."""

    def on_step(optimizer: object, args: object, kwargs: object) -> None:
        nonlocal steps, step_at_s, samples, samples_ahead, is_ahead
        if id(optimizer) != pacer and not sets_the_pace(id(optimizer)):
            return
        if others:
            others.clear()
        # The count comes last: whoever reads it finds the rest of this step, and a rank that is stopped halfway has not made the step.
        at_s = now()
        if step_at_s:
            hot[h_took] = at_s - step_at_s
        hot[h_step_at] = step_at_s = at_s
        hot[h_waited] = waited_s
        hot[h_own] = own_s
        if samples_ahead:
            samples += samples_ahead
            samples_ahead = 0
            hot[h_samples] = samples
        steps += 1.0
        hot[h_steps] = steps
        is_ahead = True

    def sets_the_pace(key: int) -> bool:
        """A round ends where an optimizer steps that has stepped in it before."""
        nonlocal pacer
        if pacer and key not in others:
            others.add(key)
            return False
        pacer = key
        return True

    def wrap_backward(original: Callable[..., Any]) -> Any:
        def backward(
            tensors: Any,
            grad_tensors: Any = None,
            retain_graph: Any = None,
            create_graph: Any = False,
            grad_variables: Any = None,
            inputs: Any = None,
        ) -> Any:
            nonlocal is_ahead, own_s
            if is_ahead:
                is_ahead = False
                own_s += now() - step_at_s
            return original(tensors, grad_tensors, retain_graph, create_graph, grad_variables, inputs)

        def backward_of_another_torch(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_ahead, own_s
            if is_ahead:
                is_ahead = False
                own_s += now() - step_at_s
            return original(*args, **kwargs)

        # Packing and unpacking what is handed on is most of what is done here.
        is_known = _takes(original) == _takes(backward)
        return _dressed(backward if is_known else backward_of_another_torch, original)

    def wrap_next(original: Callable[[Any], Any]) -> Any:
        def timed_next(iterator: Any) -> Any:
            nonlocal source, waited_s, batches, samples_ahead
            if id(iterator) != source:
                return next_of_another(iterator)
            source = _WITHIN
            hot[h_wait_began] = began_s = now()
            try:
                batch = original(iterator)
            except BaseException:  # the end of the data, as a rule: no batch came
                waited_s += now() - began_s
                hot[h_wait_began] = 0.0
                source = 0
                raise
            hot[h_wait_ended] = ended_s = now()
            waited_s += ended_s - began_s
            batches += 1.0
            hot[h_batches] = batches
            samples_ahead += batch_size
            source = id(iterator)
            return batch

        def next_of_another(iterator: Any) -> Any:
            """Not of the one that gave the main thread its last batch."""
            nonlocal source, batch_size, samples_ahead, batches
            if thread() != main_thread:  # somebody's own prefetching: its waits are not waits of training
                batch = original(iterator)
                batches += 1.0
                hot[h_batches] = batches
                hot[h_batch_at] = now()
                samples_ahead += _batch_size(iterator)
                return batch
            if source == _WITHIN:  # a loader that reads from another one
                return original(iterator)
            source, batch_size = id(iterator), _batch_size(iterator)
            samples_ahead = 0  # batches of an evaluation belong to no step
            return timed_next(iterator)

        _pass_by(next_of_another)
        return _dressed(timed_next, original)

    def wrap_init(original: Callable[..., None]) -> Any:
        def init(*args: Any, **kwargs: Any) -> None:
            nonlocal source
            if source != _WITHIN:
                source = 0  # the new one may lie where the last one lay
            original(*args, **kwargs)

        return _dressed(init, original)

    def stop() -> None:
        nonlocal hot
        hot = memoryview(bytearray(len(hot) * 8)).cast("d")

    for function in (on_step, sets_the_pace, _batch_size):
        _pass_by(function)
    observer = Observer()
    observer.on_step, observer.wrap_backward, observer.stop = on_step, wrap_backward, stop
    observer.wrap_next, observer.wrap_init = wrap_next, wrap_init
    return observer


def _batch_size(iterator: Any) -> int:
    """0: its loader does not say."""
    size = getattr(getattr(iterator, "_index_sampler", None), "batch_size", None)
    return size if type(size) is int else 0


def _takes(function: Any) -> Any:
    """Names and defaults of its arguments; None of something that is no function of Python's."""
    code = getattr(function, "__code__", None)
    return code and (
        code.co_varnames[: code.co_argcount],
        code.co_kwonlyargcount,
        code.co_flags & 12,
        function.__defaults__,
    )


def _pass_by(function: Any) -> None:
    """For torch's compiler."""
    function.__code__ = function.__code__.replace(co_filename=HOOKS_FILE)


def _dressed(function: Any, original: Any) -> Any:
    """In place of the original. As functools.wraps, which would have to be imported."""
    _pass_by(function)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(function, name, getattr(original, name, None))
    function.__wrapped__ = original
    return function


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
    page = _open_page(directory)
    observer = observe(page)
    page.words[W_BEGAN_NS] = monotonic_ns()
    page.words[W_PID] = os.getpid()
    os.register_at_fork(after_in_child=observer.stop)

    def hook_steps(module: Any) -> None:
        module.register_optimizer_step_post_hook(observer.on_step)

    def hook_loaders(module: Any) -> None:
        iterator = module._BaseDataLoaderIter
        iterator.__next__ = observer.wrap_next(iterator.__next__)
        iterator.__init__ = observer.wrap_init(iterator.__init__)

    def hook_backward(module: Any) -> None:
        module.backward = observer.wrap_backward(module.backward)

    def keep_sockets_here(module: Any) -> None:
        # What children of multiprocessing leave in their temporary directory when they are killed is removed with ours (runtime_dir.py).
        module.current_process()._config.setdefault("tempdir", os.readlink(os.path.join(directory, "tmp")))

    due: dict[str, Callable[[Any], None]] = {_STEPS: hook_steps, _LOADERS: hook_loaders, _BACKWARD: hook_backward}
    due[_GROUPS] = _hook_the_end_of_groups
    atexit.register(_let_gloo_finish)
    if os.path.exists(os.path.join(directory, "tmp")):
        due[_PROCESSES] = keep_sockets_here
    _WhenImported(due).install()
    _write_stacks_when_asked(directory)
    return observer


def _hook_the_end_of_groups(module: Any) -> None:
    original = module.destroy_process_group

    def destroy_process_group(*args: Any, **keywords: Any) -> Any:
        _let_gloo_finish()
        return original(*args, **keywords)

    module.destroy_process_group = _dressed(destroy_process_group, original)
    package = sys.modules.get("torch.distributed")  # A forked rank has it, with names of its own.
    if getattr(package, "destroy_process_group", None) is original:
        package.destroy_process_group = module.destroy_process_group  # type: ignore[union-attr]


def _let_gloo_finish() -> None:
    """Returns when gloo's threads have let go of the last collective's tensors (or after a second).

    For that they need the GIL, and torch joins them without letting go of it when the last reference to a group goes (torch 2.13, with and
    without us): a program whose last collective is a moment past never ends. While we sleep they can have it."""
    looks, deadline = 0, monotonic() + 1.0
    while looks < 3 and monotonic() < deadline:
        states = _states_of_threads(b"pt_gloo_runloop")
        if not states:
            return
        # One that has been woken is runnable, whether it has a core or not; asleep three times, it waits for work and not for the GIL.
        looks = looks + 1 if states == {b"S"} else 0
        sleep(0.002)


def _states_of_threads(name: bytes) -> set[bytes]:
    """As in proc(5)."""
    states = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/stat", "rb") as file:
                stat = file.read()
        except OSError:
            continue  # It has ended.
        end = stat.rindex(b")")
        if stat[stat.index(b"(") + 1 : end] == name:
            states.add(stat[end + 2 : end + 3])
    return states


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
