"""The catalogue of faults: small scripts that fail in one way each, and what the launcher has to say of it.

Each script runs as `train.py` on two ranks, in one attempt of a job. `RANK` is there already, and `fault()` notes the moment before the
fault happens. The rank that does not fail sleeps, or is in a collective with the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One way to fail."""

    name: str
    script: str
    words: tuple[str, ...]
    """All of these stand in the cause."""
    exit_code: int = 1
    rank: int | None = 1
    """Who is named; None: either, as both fail alike."""
    kind: str = "exception"
    """As in failure.json."""


PREAMBLE = """
import os, sys, time
RANK = int(os.environ["RANK"])
def fault():
    with open("fault_at." + os.environ["RAILHEAD_ATTEMPT"], "w") as file:
        file.write(repr(time.time()))
"""
ON_ONE = """
if RANK == 0:
    time.sleep(600)
fault()
"""
GANG = """
import datetime, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(4))
"""
ON_ONE_OF_A_GANG = (
    GANG
    + """
def train():
    for _ in range(10000):
        dist.all_reduce(torch.ones(4))
if RANK == 0:
    train()
dist.all_reduce(torch.ones(4))
fault()
"""
)
LOADER = """
import torch.utils.data as data
class Bad(data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, idx):
        if idx == 3: {}
        return idx
for _ in data.DataLoader(Bad(), batch_size=2, num_workers=1): pass
"""


def on_one(body: str, before: str = "") -> str:
    """`before`: what both ranks do, and what is not part of the fault."""
    return PREAMBLE + before + ON_ONE + body


def in_gang(body: str) -> str:
    return PREAMBLE + ON_ONE_OF_A_GANG + body


PYTHON = (
    Fault("an exception at the top level", on_one("raise ValueError('it broke')"), ("ValueError: it broke",)),
    Fault(
        "an exception on rank 0, which is shown",
        PREAMBLE + "if RANK: time.sleep(600)\nfault()\nraise ValueError('rank 0 broke')",
        ("ValueError: rank 0 broke",),
        rank=0,
    ),
    Fault(
        "an exception that another caused",
        on_one("try: 1 / 0\nexcept ZeroDivisionError as e: raise RuntimeError('loss is not finite') from e"),
        ("RuntimeError: loss is not finite",),
    ),
    Fault(
        "an exception while another is handled",
        on_one("try:\n    raise KeyError('lr')\nfinally:\n    open('/no/such/checkpoint', 'w')"),
        ("FileNotFoundError", "/no/such/checkpoint"),
    ),
    Fault("a failed assertion", on_one("assert RANK == 7, 'batch does not divide'"), ("AssertionError: batch",)),
    Fault(
        "an exception of a class of the program's own",
        on_one("class DataRot(Exception): pass\nraise DataRot('shard 7')"),
        ("DataRot: shard 7",),
    ),
    Fault(
        "an exception group",
        on_one("raise ExceptionGroup('two readers', [OSError('a'), ValueError('b')])"),
        ("ExceptionGroup: two readers",),
    ),
    Fault(
        "an exception that cannot be printed",
        on_one("class Odd(Exception):\n    def __str__(self): raise RuntimeError('no words')\nraise Odd()"),
        ("Odd",),
    ),
    Fault("an exception with a megabyte of words", on_one("raise ValueError('x' * 1_000_000)"), ("ValueError: xxx",)),
    Fault(
        "an exception under a hook of the program's own",
        on_one("sys.excepthook = lambda *_: print('nothing to see', file=sys.stderr)\nraise ValueError('hidden')"),
        ("ValueError: hidden",),
    ),
    Fault(
        "an exception under torch's @record",
        on_one(
            "@record\ndef main(): raise ValueError('recorded')\nmain()",
            "from torch.distributed.elastic.multiprocessing.errors import record",
        ),
        ("ValueError: recorded",),
    ),
    Fault("endless recursion", on_one("def f(): return f()\nf()"), ("RecursionError",)),
    Fault("a syntax error", PREAMBLE + "fault()\nif True print('x')", ("SyntaxError", "train.py"), rank=None),
    Fault(
        "a module that is missing on one rank", on_one("import no_such_module"), ("No module named 'no_such_module'",)
    ),
    Fault(
        "a name that a module lacks",
        on_one("from json import dump_all"),
        ("ImportError", "cannot import name 'dump_all'"),
    ),
    Fault(
        "modules that import each other",
        on_one(
            "open('a1.py', 'w').write('import b1\\nX = 1')\nopen('b1.py', 'w').write('from a1 import X')\nimport a1"
        ),
        ("ImportError", "partially initialized module 'a1'"),
    ),
    Fault(
        "an abort after the program's end",
        on_one("import atexit\natexit.register(os.abort)"),
        ("the program had come to its end, and the process died while it cleaned up",),
        exit_code=134,
        kind="native crash",
    ),
    Fault(
        "an import that deadlocks with its own thread",
        on_one(
            "waits = 'import threading\\nt = threading.Thread(target=__import__, args=(\"b2\",))\\nt.start()\\nt.join()'\n"
            "open('a2.py', 'w').write(waits)\nopen('b2.py', 'w').write('from a2 import X')\nimport a2"
        ),
        ("is stuck in an import: <module> (a2.py:4)",),
        exit_code=80,
        kind="hung",
    ),
    Fault(
        "a broken config file",
        on_one("import json\nopen('c.json', 'w').write('{\"lr\": }')\njson.load(open('c.json'))"),
        ("JSONDecodeError: Expecting value",),
    ),
    Fault("a missing file", on_one("open('/data/no/shard-00.tar')"), ("FileNotFoundError", "/data/no/shard-00.tar")),
    Fault("a full disk", on_one("open('/dev/full', 'w').write('x' * 99999)"), ("OSError", "No space left on device")),
    Fault(
        "a port that is taken",
        on_one(
            "import socket\na = socket.create_server(('127.0.0.1', 0))\nsocket.create_server(('127.0.0.1', a.getsockname()[1]))"
        ),
        ("OSError", "Address already in use"),
    ),
    Fault(
        "a server that nobody is",
        on_one("import socket\nsocket.create_connection(('127.0.0.1', 9))"),
        ("ConnectionRefusedError",),
    ),
    Fault(
        "too many open files",
        on_one(
            "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\nkeep = [open('/dev/null') for _ in range(99)]"
        ),
        ("OSError", "Too many open files"),
    ),
    Fault(
        "no memory for an allocation",
        on_one("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 34, 1 << 34))\nx = bytearray(1 << 40)"),
        ("MemoryError",),
    ),
    Fault(
        "a time-out of the program's own",
        on_one("raise TimeoutError('no batch for 60 s')"),
        ("TimeoutError: no batch",),
    ),
    Fault(
        "SIGINT to one rank",
        on_one("import signal\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"),
        ("KeyboardInterrupt",),
        exit_code=130,
    ),
    Fault(
        "both ranks, one after the other",
        PREAMBLE
        + "def is_there(pid):\n    try: os.kill(pid, 0)\n    except OSError: return False\n    return True\n"
        + "pid = 'pid.' + os.environ['RAILHEAD_ATTEMPT']\n"
        + "if RANK:\n    open('pid.tmp', 'w').write(str(os.getpid()))\n    os.rename('pid.tmp', pid)\n"
        + "while RANK == 0 and not os.path.exists(pid): time.sleep(0.001)\n"
        + "while RANK == 0 and is_there(int(open(pid).read())): time.sleep(0.001)\n"
        + "if RANK: fault()\nraise ValueError(f'rank {RANK}')",
        ("ValueError: rank 1",),
    ),
    Fault(
        "an exception, then a slow end",
        on_one("import atexit\natexit.register(time.sleep, 0.5)\nraise ValueError('slow to die')"),
        ("ValueError: slow to die",),
    ),
)

EXITS = (
    Fault(
        "sys.exit(3)",
        on_one("def main():\n    sys.exit(3)\nmain()"),
        ("exit code 3", "sys.exit(3) at train.py:", "in main"),
        exit_code=3,
        kind="exit code",
    ),
    Fault(
        "sys.exit with words",
        on_one("sys.exit('no data for today')"),
        ("sys.exit('no data for today')",),
        kind="exit code",
    ),
    Fault(
        "a bad argument",
        on_one("import argparse\nargparse.ArgumentParser().parse_args(['--learning-rat', '3'])"),
        ("unrecognized arguments: --learning-rat 3",),
        exit_code=2,
        kind="exit code",
    ),
    Fault("os._exit(4)", on_one("os._exit(4)"), ("exit code 4", "os._exit"), exit_code=4, kind="exit code"),
    Fault(
        "an exception in a thread that ends the process",
        on_one(
            "import threading\ndef work():\n    raise ValueError('in a thread')\n"
            "t = threading.Thread(target=work, name='feeder')\nt.start(); t.join()\nos._exit(1)"
        ),
        ("ValueError: in a thread", "in thread feeder"),
        kind="exit code",
    ),
    Fault(
        "an error that is only printed",
        on_one("import traceback\ntry: 1 / 0\nexcept Exception: traceback.print_exc()\nos._exit(5)"),
        ("ZeroDivisionError: division by zero",),
        exit_code=5,
        kind="exit code",
    ),
)

SIGNALS = (
    Fault(
        "SIGKILL by somebody",
        on_one("os.kill(os.getpid(), 9)"),
        ("signal 9 (SIGKILL)", "sent by someone else"),
        exit_code=137,
        kind="signal",
    ),
    Fault(
        "SIGTERM to one rank",
        on_one("os.kill(os.getpid(), 15)\ntime.sleep(9)"),
        ("signal 15 (SIGTERM)",),
        exit_code=143,
        kind="signal",
    ),
    Fault(
        "SIGUSR1 to a rank that does not expect it",
        on_one("os.kill(os.getpid(), 10)\ntime.sleep(9)"),
        ("signal 10 (SIGUSR1)",),
        exit_code=138,
        kind="signal",
    ),
    Fault(
        "os.abort",
        on_one("def save():\n    os.abort()\nsave()"),
        ("signal 6 (SIGABRT)", "in native code, called at", "in save"),
        exit_code=134,
        kind="native crash",
    ),
    Fault(
        "a segmentation fault",
        on_one("import ctypes\ndef load():\n    ctypes.memmove(0, b'x', 1)\nload()"),
        ("signal 11 (SIGSEGV)", "in native code, called at", "in load"),
        exit_code=139,
        kind="native crash",
    ),
    Fault(
        "a segmentation fault in another thread",
        on_one(
            "import ctypes, threading\ndef read():\n    ctypes.memmove(0, b'x', 1)\n"
            "threading.Thread(target=read).start()\ntime.sleep(9)"
        ),
        ("signal 11 (SIGSEGV)", "in read"),
        exit_code=139,
        kind="native crash",
    ),
    Fault(
        "a memory map of a file that was cut",
        on_one(
            "import mmap\nf = open('m', 'w+b'); f.truncate(8192)\nm = mmap.mmap(f.fileno(), 8192)\nf.truncate(0)\n"
            "def read(): return m[5000]\nread()"
        ),
        ("signal 7 (SIGBUS)", "in read"),
        exit_code=135,
        kind="native crash",
    ),
    Fault(
        "a heap that glibc finds damaged",
        on_one(
            "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.malloc.restype = ctypes.c_void_p\n"
            "x = ctypes.c_void_p(libc.malloc(24))\nlibc.free(x)\nlibc.free(x)"
        ),
        ("signal 6 (SIGABRT)", "double free", "in native code"),
        exit_code=134,
        kind="native crash",
    ),
)

CHILDREN = (
    Fault(
        "an exception in a data loader's worker",
        on_one(LOADER.format("raise ValueError('bad sample 3')"), "import torch.utils.data"),
        ("ValueError: bad sample 3", "in DataLoader worker process 0"),
    ),
    Fault(
        "a data loader's worker that is killed",
        on_one(LOADER.format("os.kill(os.getpid(), 9)"), "import torch.utils.data"),
        ("DataLoader worker (pid", "killed by signal: Killed", "sent by someone else"),
    ),
    Fault(
        "a data loader's worker that crashes",
        on_one(LOADER.format("__import__('ctypes').memmove(0, b'x', 1)"), "import torch.utils.data"),
        ("DataLoader worker (pid", "killed by signal: Segmentation fault"),
    ),
    Fault(
        "a program that fails",
        on_one("import subprocess\nsubprocess.run(['false'], check=True)"),
        ("CalledProcessError", "false", "exit status 1"),
    ),
    Fault(
        "a process pool whose worker dies",
        on_one(
            "import concurrent.futures as f, multiprocessing as m\n"
            "pool = f.ProcessPoolExecutor(1, mp_context=m.get_context('fork'))\npool.submit(os._exit, 1).result()"
        ),
        ("BrokenProcessPool",),
    ),
)

GANGS = (
    Fault(
        "an exception; the other is in a collective", in_gang("raise ValueError('mid step')"), ("ValueError: mid step",)
    ),
    Fault(
        "SIGKILL; the other is in a collective",
        in_gang("os.kill(os.getpid(), 9)"),
        ("signal 9 (SIGKILL)", "sent by someone else"),
        exit_code=137,
        kind="signal",
    ),
    Fault(
        "a crash; the other is in a collective",
        in_gang("import ctypes\nctypes.memmove(0, b'x', 1)"),
        ("signal 11 (SIGSEGV)",),
        exit_code=139,
        kind="native crash",
    ),
    Fault(
        "an exception after the connection was closed",
        in_gang("dist.destroy_process_group()\nraise ValueError('after the fact')"),
        ("ValueError: after the fact",),
    ),
    Fault(
        "a rank that ends with 0 while the other waits",
        in_gang("os._exit(0)"),
        ("Connection", "rank 1 had ended with exit code 0 before that"),
        rank=0,
        kind="lost its peer",
    ),
    Fault(
        "an exception before the rendezvous",
        PREAMBLE + "import torch.distributed as dist\nif RANK == 1:\n    fault()\n    raise ValueError('never came')\n"
        "dist.init_process_group('gloo')",
        ("ValueError: never came",),
    ),
    Fault(
        "sizes that do not match in a collective",
        PREAMBLE + GANG + "fault()\ndist.all_reduce(torch.ones(4 + 4 * RANK))\ntime.sleep(9)",
        ("collective mismatch",),
        exit_code=134,
        rank=None,
        kind="native crash",
    ),
    Fault(
        "a rank that does not come to a monitored barrier",
        PREAMBLE
        + GANG
        + "fault()\nif RANK: time.sleep(9)\ndist.monitored_barrier(timeout=datetime.timedelta(seconds=1))",
        ("Rank 1 failed to pass monitoredBarrier",),
        rank=0,
        kind="lost its peer",
    ),
    Fault(
        "an exception in backward under DDP",
        in_gang("").replace(
            "def train():",
            "class Bad(torch.autograd.Function):\n    forward = staticmethod(lambda ctx, x: x)\n"
            "    @staticmethod\n    def backward(ctx, g): raise FloatingPointError('nan in backward')\ndef train():",
        )
        + "m = torch.nn.Linear(2, 2)\nBad.apply(m(torch.ones(2))).sum().backward()",
        ("FloatingPointError: nan in backward",),
    ),
)

TORCH = (
    Fault(
        "shapes that do not fit",
        on_one("torch.nn.Linear(3, 3)(torch.ones(2, 4))", "import torch"),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied",),
    ),
    Fault(
        "a damaged checkpoint",
        on_one("open('c.pt', 'wb').write(b'not a checkpoint')\ntorch.load('c.pt')", "import torch"),
        ("UnpicklingError",),
    ),
    Fault(
        "a state that does not fit the model",
        on_one("torch.nn.Linear(2, 2).load_state_dict({})", "import torch"),
        ("RuntimeError: Error(s) in loading state_dict",),
    ),
    Fault(
        "a GPU that is not there",
        on_one("torch.ones(1, device='cuda:7')", "import torch"),
        ("CUDA",),
    ),
)

CATALOGUE = (*GANGS, *TORCH, *CHILDREN, *PYTHON, *EXITS, *SIGNALS)
"""The first imports all that the others need, so that the fork server has it from then on."""
