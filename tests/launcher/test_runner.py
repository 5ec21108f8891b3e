"""A program under the runner, executed or forked, sees what it would see under the plain interpreter: each script is run both ways
and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from launcher.node import runner
from tests.launcher.forked import fork_and_wait

RUNNER = str(Path(runner.__file__))


class Both:
    """Runs a target plainly and under the runner, in the same directory, and compares what can be seen from outside."""

    def __init__(self, directory: Path, way: str) -> None:
        self.directory = directory
        self.way = way
        self.error_file = directory / "error.json"

    def write(self, name: str, text: str) -> str:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return name

    def plain(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-u", *argv], env)

    def under_runner(self, kind: str, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.error_file.unlink(missing_ok=True)
        env = {"TORCHELASTIC_ERROR_FILE": str(self.error_file), **env}
        if self.way == "forked":
            observer = list(argv[:2]) if kind == "--observer" else []
            kind, *argv = argv[2:] if observer else [kind, *argv]
            return fork_and_wait(self.directory, self._environment(env), kind, *argv, observer=observer)
        return self._run([sys.executable, "-u", RUNNER, kind, *argv], env)

    def same(self, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        """`-m name …` or `script …`; asserts the same output and exit code and returns the runner's result."""
        plain = self.plain(*argv, **env)
        kind, rest = ("module", argv[1:]) if argv[0] == "-m" else ("script", argv)
        ours = self.under_runner(kind, *rest, **env)
        assert ours.stdout == plain.stdout
        assert _but_for_depth(ours.stderr) == _but_for_depth(plain.stderr)
        assert ours.returncode == plain.returncode
        return ours

    def record(self) -> dict[str, object]:
        message: dict[str, object] = json.loads(self.error_file.read_text())["message"]
        return message

    def _run(self, argv: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        with open(self.directory / "out", "w+") as out, open(self.directory / "err", "w+") as err:
            code = subprocess.run(
                argv, cwd=self.directory, env=self._environment(env), stdout=out, stderr=err, timeout=60, check=False
            ).returncode
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(argv, code, out.read(), err.read())

    @staticmethod
    def _environment(env: dict[str, str]) -> dict[str, str]:
        # The plain run must not find a name in the environment that the runner's has not.
        return {"TORCHELASTIC_ERROR_FILE": "", **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env}


def _but_for_depth(text: str) -> str:
    """Two differences are known and allowed: our frames take four of the recursion limit, and when the program's own excepthook fails, the
    interpreter's second traceback shows that we called it."""
    text = re.sub(r"repeated \d+ more times", "repeated N more times", text)
    return re.sub(r'  File "[^"]*runner\.py", line \d+, in excepthook\n    .*\n', "", text)


@pytest.fixture(params=["executed", "forked"])
def both(tmp_path: Path, request: pytest.FixtureRequest) -> Both:
    return Both(tmp_path, request.param)


SEE_EVERYTHING = """
import sys, __main__
print("argv", sys.argv, "orig", sys.orig_argv[1:])
print("path0", sys.path[0], "path", sys.path)
print("name", __name__, "file", __file__, "spec", __spec__ and (__spec__.name, __spec__.origin))
print("package", __package__, "cached", __cached__, "doc", __doc__)
print("loader", type(__loader__).__name__, "builtins", __builtins__, "annotations", __annotations__)
print("globals", sorted(globals()), "is main", __main__.__dict__ is globals())
print("ours", [name for name in sys.modules if name.partition(".")[0] in ("launcher", "cache", "runner")])
print("flags", sys.flags.unbuffered, "stdout", sys.stdout.name, sys.stdout.mode, sys.stdout.encoding, sys.stdout.errors)
print("stream", sys.stdout.fileno(), sys.stdout.line_buffering, sys.stdout.write_through, sys.stdout is sys.__stdout__)
print("err", sys.stderr.name, sys.stderr.errors, sys.stdout.isatty())
import os
sys.stdout.buffer.write(b"bytes\\n")
print("cwd", os.getcwd())
"""

SCRIPTS = {
    "returns": "print('done')",
    "exit code": "import sys; sys.exit(7)",
    "exit with message": "import sys; sys.exit('what went wrong')",
    "exit with None": "import sys; sys.exit(None)",
    "raises SystemExit": "raise SystemExit(9)",
    "exception": "def f():\n    raise ValueError('it broke\\nin two lines')\nf()",
    "chained": "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise RuntimeError('later') from e",
    "group": "raise ExceptionGroup('many', [ValueError('a'), TypeError('b')])",
    "note": "e = ValueError('x'); e.add_note('try y'); raise e",
    "syntax error": "x = = 1",
    "non-utf8 declared": "# -*- coding: latin-1 -*-\nprint('ok')",
    "import error": "import no_such_module",
    "recursion": "def f(): f()\nf()",
    "os._exit": "import os; print('bye', flush=True); os._exit(5)",
    "dies by a signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "abort": "import os; os.abort()",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "atexit": "import atexit; atexit.register(print, 'at exit'); raise ValueError('x')",
    "atexit after exit": "import atexit, sys; atexit.register(print, 'at exit'); sys.exit(3)",
    "thread outlives main": "import threading, time\nthreading.Timer(0.05, print, ['thread done']).start()\nprint('main done')",
    "own excepthook": "import sys\nsys.excepthook = lambda t, v, tb: print('hook', t.__name__, v, tb.tb_frame.f_code.co_name)\n1/0",
    "excepthook that fails": "import sys\ndef hook(*a): raise OSError('hook broke')\nsys.excepthook = hook\n1/0",
    "future annotations": "from __future__ import annotations\nx: no_such = 1\nprint(__annotations__)",
    "no future leak": "x: int = 1\nprint(__annotations__)",
    "warning": "import warnings; warnings.warn('careful')",
    "inspect": "import inspect\ndef f(): return 1\nprint(inspect.getsource(f))",
    "pickle": "import pickle\nclass A: x = 1\nprint(pickle.loads(pickle.dumps(A())).x, A.__module__)",
    "last exception": "import atexit, sys\natexit.register(lambda: print(sys.last_type, sys.last_value))\n1/0",
    "globals survive": "import atexit\nname = 'kept'\ndef late(): print(name)\natexit.register(late)",
    "spawned children": """
import multiprocessing as mp, sys
def work(x): return x * x, __name__, sys.argv[1:]
if __name__ == "__main__":
    with mp.get_context("spawn").Pool(2) as pool: print(pool.map(work, range(3)))
""",
    "forkserver children": """
import multiprocessing as mp
class Thing:
    value = 4
def work(thing): return thing.value
if __name__ == "__main__":
    with mp.get_context("forkserver").Pool(1) as pool: print(pool.map(work, [Thing()]))
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_ends_and_speaks_as_under_the_interpreter(both: Both, name: str) -> None:
    both.same(both.write("train.py", SCRIPTS[name]), "--lr", "0.1")


@pytest.mark.parametrize("target", ["train.py", "./train.py", "sub/train.py", "/ABS/train.py"])
def test_a_script_finds_itself_where_the_interpreter_puts_it(both: Both, target: str) -> None:
    target = target.replace("/ABS", str(both.directory))
    both.write(target, SEE_EVERYTHING)
    both.same(target, "a b", "--flag", "-m", "--", "ü")


def test_a_script_with_a_docstring_imports_its_neighbours_through_a_symlink(both: Both) -> None:
    both.write("real/helper.py", "value = 3")
    both.write("real/train.py", '"""Doc."""\nimport helper, sys\nprint(helper.value, __doc__, __file__, sys.path[0])')
    (both.directory / "link.py").symlink_to(both.directory / "real" / "train.py")
    both.same("link.py")


def test_a_users_own_launcher_module_is_what_the_script_imports(both: Both) -> None:
    """People have a launcher.py; a package of ours in sys.modules would hide it."""
    both.write("launcher.py", "value = 'mine'")
    both.write("cache.py", "value = 'mine too'")
    ours = both.same(both.write("train.py", "import launcher, cache; print(launcher.value, cache.value)"))
    assert ours.stdout == "mine mine too\n"


@pytest.mark.parametrize("target", ["pkg.train", "pkg", "top"])
def test_a_module_sees_what_python_m_shows_it(both: Both, target: str) -> None:
    both.write("pkg/__init__.py", "print('package', __name__)")
    both.write("pkg/__main__.py", SEE_EVERYTHING + "print(__spec__.name)")
    both.write("pkg/train.py", SEE_EVERYTHING + "from . import helper; print(helper.value, __spec__.name)")
    both.write("pkg/helper.py", "value = 1")
    both.write("top.py", SEE_EVERYTHING + "print(__spec__.origin)")
    both.same("-m", target, "a b", "-x")


@pytest.mark.parametrize("target", ["pkg.broken", "pkg.raises", "no_such_module", "pkg.missing", "justdir"])
def test_a_module_that_fails_fails_in_the_same_words(both: Both, target: str) -> None:
    both.write("pkg/__init__.py", "")
    both.write("pkg/broken.py", "x = = 1")
    both.write("pkg/raises.py", "raise ValueError('x')")
    both.write("justdir/__init__.py", "")
    both.same("-m", target)


def test_a_directory_and_a_zip_run_as_under_the_interpreter(both: Both) -> None:
    both.write("app/__main__.py", SEE_EVERYTHING)
    both.same("app", "x")
    with zipfile.ZipFile(both.directory / "app.zip", "w") as archive:
        archive.writestr("__main__.py", "import sys; print(sys.argv, sys.path[0], __name__, __spec__.name); 1/0")
    both.same("app.zip", "x")


def test_a_script_that_is_not_there_is_said_like_the_interpreter(both: Both) -> None:
    assert both.same("nothing.py").returncode == 2


@pytest.mark.parametrize("variable", ["PYTHONSAFEPATH", "PYTHONOPTIMIZE", "PYTHONDONTWRITEBYTECODE"])
def test_interpreter_settings_from_the_environment_hold(both: Both, variable: str) -> None:
    script = both.write("train.py", "import sys\nprint(sys.path, sys.flags)\nassert False, 'checked'")
    both.same(script, **{variable: "1"})


def test_the_exception_is_recorded_in_torchs_form_without_our_frames(both: Both) -> None:
    both.under_runner("script", both.write("train.py", SCRIPTS["chained"]))
    message = both.record()
    assert message["message"] == "RuntimeError: later"
    callstack = message["extraInfo"]["py_callstack"]  # type: ignore[index]
    assert callstack.count("Traceback (most recent call last)") == 2
    assert "runner.py" not in callstack
    assert callstack.endswith("RuntimeError: later\n")


@pytest.mark.parametrize("name", ["exit code", "returns", "raises SystemExit"])
def test_an_exit_that_is_no_exception_leaves_no_record(both: Both, name: str) -> None:
    both.under_runner("script", both.write("train.py", SCRIPTS[name]))
    assert not both.error_file.exists()


def test_a_record_that_the_script_wrote_itself_is_left_alone(both: Both) -> None:
    """Scripts that use torch's @record know better what to write."""
    text = """
import os
with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file: file.write('{"message": "mine"}')
raise ValueError("theirs")
"""
    both.under_runner("script", both.write("train.py", text))
    assert both.record() == "mine"


def test_a_record_that_cannot_be_written_does_not_hide_the_exception(both: Both) -> None:
    script = both.write("train.py", SCRIPTS["exception"])
    ours = both.under_runner(
        "script", script, TORCHELASTIC_ERROR_FILE=str(both.directory / "no" / "such" / "error.json")
    )
    assert ours.returncode == 1
    assert "it broke" in ours.stderr


def test_an_exception_that_cannot_be_printed_still_ends_the_rank_with_1(both: Both) -> None:
    text = "class Bad(Exception):\n    def __str__(self): raise RuntimeError('no words')\nraise Bad"
    assert both.same(both.write("train.py", text)).returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_print_to_a_full_disk_does_not_end_the_training(both: Both) -> None:
    """The log loses words; the training goes on."""
    script = both.write(
        "train.py", "import sys\nfor i in range(3): print(i)\nprint('x', file=sys.stderr)\nopen('done', 'w')"
    )
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-u", RUNNER, "script", script], cwd=both.directory, stdout=full, stderr=full, check=False
        )
    assert result.returncode == 0
    assert (both.directory / "done").exists()
    shutil.rmtree(both.directory, ignore_errors=True)


def test_an_observer_runs_before_the_program_and_is_in_no_ones_way(both: Both) -> None:
    """What counts a rank's steps is loaded this way: the program must not be able to trip over it."""
    both.write("watch.py", "import sys\ndef begin(argument): print('watching', argument, __name__ in sys.modules)")
    script = both.write("train.py", SEE_EVERYTHING)
    plain = both.plain(script, "x")
    ours = both.under_runner("--observer", str(both.directory / "watch.py"), "a b", "script", script, "x")
    assert ours.stdout == "watching a b False\n" + plain.stdout


@pytest.mark.parametrize("text", ["x = = 1", "def begin(argument): 1/0", "", "raise ImportError('torch')"])
def test_an_observer_that_fails_costs_one_line_and_not_the_training(both: Both, text: str) -> None:
    both.write("watch.py", text)
    script = both.write("train.py", "print('trained')")
    ours = both.under_runner("--observer", str(both.directory / "watch.py"), "", "script", script)
    assert (ours.returncode, ours.stdout) == (0, "trained\n")
    assert ours.stderr.count("\n") == 1 and "unobserved" in ours.stderr
