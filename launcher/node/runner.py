"""Runs the user's program as `__main__` in this process, as the interpreter would, and writes down the exception that ends it.

Executed by path: `python -u runner.py [--observer FILE ARGUMENT] script|module TARGET [ARGS…]`. Standard library only and nothing
of ours is imported, so no module of the launcher is in the program's `sys.modules` (people have a `launcher.py` of their own).
After `_run_*` has handed over, the program sees what it would see under `python -u TARGET`: sys.argv, sys.path[0], `__main__` with
its `__file__` and `__spec__`, the interpreter's own handling of SystemExit, KeyboardInterrupt, uncaught exceptions, threads and
atexit; tests/launcher/test_runner.py compares them.

An *observer* is a file of Python that is executed before the program, in a namespace that no import can find, and whose `begin(ARGUMENT)`
is called then (in a rank, the argument is the rank's directory). What it needs of the program (steps, data loaders) it must hook without
importing what the program might not want; a fault in it is one line on standard error, never the end of the training.

A rank that was forked has this module loaded by its fork server (`forkserver.py`), which calls `run`.

The record goes to TORCHELASTIC_ERROR_FILE in torch's format, unless the program has written one itself (torch's `@record`).
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import fcntl
import io
import json
import os
import runpy
import stat
import sys
import time
import traceback
import types
from importlib.machinery import SourceFileLoader
from typing import Any

_ours = {__file__}
"""Files whose frames are taken off the program's tracebacks."""
_within: set[str] = set()
"""Those of them that may stand anywhere in one: the observer's hooks."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CRASH_FILE, EXIT_FILE, TRACEBACK_FILE = "crash.log", "exit.json", "traceback.at"
"""Beside TORCHELASTIC_ERROR_FILE."""
_MAX_TEXT = 64 * 1024
_FIRST_FD = 400
"""Above the numbers that a program would get anyhow."""


class _LogFile(io.FileIO):
    """A log on a full disk loses its words; it does not stop the training with an OSError from `print`."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _DISK_FULL:
                return memoryview(data).nbytes
            raise


def _guard_stream(stream: Any, fd: int) -> Any:
    """The same stream as `python -u` makes, over a file that forgives a full disk."""
    if type(getattr(stream, "buffer", None)) is not io.FileIO:
        return stream  # not what -u makes (PYTHON_EXEC may be anything)
    raw = _LogFile(fd, "w", closefd=False)
    raw.name = stream.buffer.name
    guarded = io.TextIOWrapper(raw, stream.encoding, stream.errors, newline="\n", write_through=True)
    guarded.mode = "w"  # type: ignore[misc]
    return guarded


def _record(error: BaseException, error_file: str) -> None:
    """Best effort: nothing here may hide the exception itself."""
    with contextlib.suppress(Exception):
        if not error_file or os.path.exists(error_file):
            return
        now = time.time()
        # `python -m` shows its frames in runpy on the terminal, so we do too; the record is about the program alone.
        tb = _without(error.__traceback__, *_ours, "<frozen runpy>")
        text = "".join(traceback.format_exception(type(error), error, tb))
        data = {
            "message": {
                "message": _cut(f"{type(error).__qualname__}: {_words_of(error)}"),
                "extraInfo": {"py_callstack": _cut(text), "timestamp": str(int(now)), "timestamp_s": now},
            }
        }
        with open(error_file, "w") as file:
            json.dump(data, file)


def _words_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "<exception str() failed>"  # what the interpreter prints then


def _cut(text: str) -> str:
    """The record is read by the launcher and sent between machines; the log has all."""
    if len(text) <= _MAX_TEXT:
        return text
    half = _MAX_TEXT // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters, see stderr.log …\n{text[-half:]}"


def _without(tb: types.TracebackType | None, *files: str) -> types.TracebackType | None:
    """The traceback from the first frame on that is in none of these files, and without the observer's hooks further down."""
    while tb is not None and tb.tb_frame.f_code.co_filename in files:
        tb = tb.tb_next
    at = tb
    while at is not None:
        while at.tb_next is not None and at.tb_next.tb_frame.f_code.co_filename in _within:
            at.tb_next = at.tb_next.tb_next
        at = at.tb_next
    return tb


def _hide_us_from_the_hook(note_file: str) -> None:
    """The interpreter is about to print the exception: through the program's own hook, if it set one, but without our frames. Where in
    the log it stands is written down, because the launcher tells it once, with its report (`follow.py`)."""
    hook = sys.excepthook

    def excepthook(kind: Any, error: BaseException, tb: types.TracebackType | None) -> None:
        tb = _without(tb, *_ours)
        is_noted = bool(note_file) and not isinstance(error, KeyboardInterrupt) and _note_position(note_file)
        try:
            hook(kind, error.with_traceback(tb), tb)
        finally:
            if is_noted:
                _note_position(note_file)

    sys.excepthook = excepthook


def _note_position(path: str) -> bool:
    """Appends the present length of standard error; best effort."""
    try:
        status = os.fstat(2)
        if not stat.S_ISREG(status.st_mode):
            return False
        with open(path, "a") as file:
            file.write(f"{status.st_size}\n")
    except (OSError, ValueError):
        return False
    return True


def _fresh_main() -> types.ModuleType:
    """Our own module steps aside: pickling and multiprocessing look for the program's names in `__main__`."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={})
    sys.modules["__main__"] = main
    return main


def _run_script(target: str, args: list[str]) -> None:
    sys.argv = [target, *args]
    sys.orig_argv = [sys.executable, "-u", target, *args]
    if os.path.isdir(target) or _is_archive(target):
        if not sys.flags.safe_path:
            del sys.path[0]
        sys.path.insert(0, os.path.join(os.getcwd(), target))
        _fresh_main()
        runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.realpath(target))
    main = _fresh_main()
    path = os.path.join(os.getcwd(), target)
    main.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr)
        sys.exit(2)
    exec(compile(source, path, "exec", dont_inherit=True), main.__dict__)


def _is_archive(target: str) -> bool:
    import pkgutil
    import zipimport

    return isinstance(pkgutil.get_importer(target), zipimport.zipimporter)


def _run_module(target: str, args: list[str]) -> None:
    sys.argv = ["-m", *args]
    sys.orig_argv = [sys.executable, "-u", "-m", target, *args]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
    _fresh_main()
    runpy._run_module_as_main(target)  # type: ignore[attr-defined]


def _begin_observer(path: str, argument: str) -> None:
    try:
        with io.open_code(path) as file:
            code = compile(file.read(), path, "exec", dont_inherit=True)
        namespace = {"__name__": "_railhead_observer", "__file__": path, "__builtins__": sys.modules["builtins"]}
        exec(code, namespace)
        _within.add(str(namespace.get("HOOKS_FILE", path)))
        namespace["begin"](argument)  # type: ignore[operator]
    except Exception as error:
        print(f"launcher: this rank runs unobserved: {type(error).__name__}: {error}", file=sys.stderr)


def guard_streams() -> None:
    """Standard output and error that forgive a full disk."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = _guard_stream(getattr(sys, name), fd)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(
    kind: str, target: str, args: list[str], observer: list[str], *, modules_file: str = "", caller: str = ""
) -> None:
    """Runs the program to its end; what ends it passes through. To be called where an exception reaches the interpreter's own top level.

    modules_file: where the names of imported modules go when the program ends or has made its first step. caller: the file that calls.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    pid = os.getpid()  # a child that the program forks unwinds through here too, and is not the rank
    _ours.add(caller)
    if error_file:
        _write_stack_of_a_crash(os.path.join(os.path.dirname(error_file), CRASH_FILE))
    try:
        if observer:
            _begin_observer(*observer)
        if modules_file:
            _report_modules_after_a_step(modules_file)
        (_run_module if kind == "module" else _run_script)(target, args)
        if error_file and os.getpid() == pid:
            _note_end(os.path.join(os.path.dirname(error_file), EXIT_FILE))
    except SystemExit as error:
        if error_file and os.getpid() == pid:
            _note_exit(error, os.path.join(os.path.dirname(error_file), EXIT_FILE))
        raise
    except BaseException as error:
        is_ours = os.getpid() == pid
        if is_ours:
            _record(error, error_file)
        beside = os.path.join(os.path.dirname(error_file), TRACEBACK_FILE)
        _hide_us_from_the_hook(beside if error_file and is_ours else "")
        raise
    finally:
        if modules_file:
            _report_modules(modules_file)


def _note_exit(error: SystemExit, path: str) -> None:
    """Where the program's own code called `sys.exit`; best effort."""
    if error.code in (None, 0):
        _note_end(path)
        return
    with contextlib.suppress(Exception):
        where = ""
        tb = _without(error.__traceback__, *_ours, "<frozen runpy>")
        while tb is not None:
            name = tb.tb_frame.f_code.co_filename
            if not name.startswith((sys.prefix, sys.base_prefix, "<frozen")):
                shown = os.path.relpath(name) if name.startswith(os.path.join(os.getcwd(), "")) else name
                where = f"{shown}:{tb.tb_lineno} in {tb.tb_frame.f_code.co_name}"
            tb = tb.tb_next
        with open(path, "w") as file:
            json.dump({"code": repr(error.code)[:1000], "where": where}, file)


def _note_end(path: str) -> None:
    """The program has come to its end: what kills the process now is the interpreter's clean-up, or a library's. Best effort."""
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write('{"has_ended": true}')


def _write_stack_of_a_crash(path: str) -> None:
    """A segmentation fault says nothing by itself: the Python stack goes into a file of ours, unless the user has faulthandler on."""
    if faulthandler.is_enabled():
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            high_fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
        finally:
            os.close(fd)
        faulthandler.enable(file=high_fd, all_threads=True)


def _report_modules(path: str) -> None:
    """Best effort; once."""
    with contextlib.suppress(Exception):
        if os.path.exists(path):
            return
        found = [
            [name, getattr(getattr(module, "__spec__", None), "origin", None)]
            for name, module in list(sys.modules.items())
        ]
        with open(f"{path}.{os.getpid()}", "w") as file:
            json.dump([[name, origin] for name, origin in found if isinstance(origin, str)], file)
        os.replace(f"{path}.{os.getpid()}", path)


def _report_modules_after_a_step(path: str) -> None:
    """A rank that is killed cannot report at its end. By its first step a training has imported what it needs, lazy parts too."""
    optimizer = sys.modules.get("torch.optim.optimizer")
    if optimizer is None:
        return  # the program imports torch itself; how it ends will tell

    def report(*_: Any) -> None:
        handle.remove()
        _report_modules(path)

    handle = optimizer.register_optimizer_step_post_hook(report)


def _main() -> None:
    words = sys.argv[1:]
    observer = words[1:3] if words[0] == "--observer" else []
    kind, target, *args = words[3:] if observer else words
    guard_streams()
    run(kind, target, args, observer)


if __name__ == "__main__":
    _main()
