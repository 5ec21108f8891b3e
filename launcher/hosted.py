"""The launcher as `launcher.job` starts it: in a process of its own; its arguments are PARENT_PID ORDER_FD NEWS_FD.

It takes a pickled order, does what `python -m launcher` does, and sends news (the run directory, the error that kept it from running) as
pickles. When its parent dies, however, it stops the job as if it had been sent SIGTERM: the parent cannot be trusted to do it, it may be a
notebook's kernel that was killed.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading

from launcher import cli
from launcher.errors import EXIT_INTERNAL, LauncherError


def main() -> int:
    parent_pid, order_fd, news_fd = (int(word) for word in sys.argv[1:4])
    for fd in (order_fd, news_fd):
        os.set_inheritable(fd, False)
    with os.fdopen(order_fd, "rb") as order:
        argv, intent = pickle.load(order)
    sys.argv = list(argv)  # what the journal shows
    threading.Thread(target=_stop_with, args=(parent_pid,), name="parent", daemon=True).start()

    def tell(kind: str, value: object) -> None:
        data = pickle.dumps((kind, value))
        try:
            os.write(news_fd, len(data).to_bytes(8, "little") + data)
        except OSError:  # nobody listens any more
            return

    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.run(intent, lambda run_dir: tell("run_dir", run_dir))
    except LauncherError as error:
        tell("error", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        tell(
            "error",
            LauncherError(f"a fault in the launcher: {type(error).__name__}: {error}", advice="please report it"),
        )
        return EXIT_INTERNAL


def _stop_with(parent_pid: int) -> None:
    try:
        fd = os.pidfd_open(parent_pid)
        if os.getppid() == parent_pid:
            select.select([fd], [], [])
    except OSError:
        pass  # it is dead already
    os.kill(os.getpid(), signal.SIGTERM)
