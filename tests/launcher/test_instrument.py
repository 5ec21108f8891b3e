"""What is seen of a rank from within: steps, waits and samples of a program that knows nothing of it, and no step lost or torn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.node import progress
from launcher.node.pages import RankPage, read_page
from tests.launcher.launched import launch
from tests.launcher.observed import INSTRUMENT, Observed, load_instrument


@pytest.fixture
def observed(tmp_path: Path) -> Iterator[Observed]:
    observed = Observed(tmp_path)
    yield observed
    observed.close()


# --- the page -----------------------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The writer got so far."""


class Recorded:
    """Stands for the hot words, and stops their writer after a number of stores."""

    def __init__(self, page: progress.Page) -> None:
        self.hot, self._page, self.left = self, page, 1 << 30

    def __len__(self) -> int:
        return progress.NUM_HOT

    def __setitem__(self, idx: int, value: float) -> None:
        if not self.left:
            raise Stopped
        self.left -= 1
        self._page.hot[idx] = value


@pytest.mark.parametrize("num_stores", range(11))
def test_a_rank_that_is_stopped_in_the_middle_of_a_step_has_not_made_it(num_stores: int, tmp_path: Path) -> None:
    """Or killed, between any two stores: what is read then is a moment that was, or nothing worse than a later time beside it."""
    fd = progress.create()
    page = progress.Page(fd, writable=True)
    page.words[progress.W_PID] = 1
    recorded = Recorded(page)
    observer = load_instrument()["observe"](recorded)
    backward, fetch = observer.wrap_backward(lambda: None), observer.wrap_next(FakeLoader.next)
    loader, optimizer = FakeLoader(8), object()

    def train() -> None:
        fetch(loader)
        backward()
        observer.on_step(optimizer, (), {})

    for _ in range(3):
        train()
    before = read_page(page, time.monotonic_ns())
    recorded.left = num_stores
    try:
        train()
        is_whole = True
    except Stopped:
        is_whole = False
    after = read_page(page, time.monotonic_ns())
    recorded.left = 1 << 30
    assert (before["steps"], before["samples"]) == (3, 24)
    assert after["steps"] == (4 if is_whole else 3)
    assert after["samples"] in ((32,) if is_whole else (24, 32))
    for name in ("waited_s", "own_s", "step_s", "batches"):
        assert after[name] is not None and isinstance(after[name], int | float) and after[name] >= 0  # type: ignore[operator]
    assert isinstance(after["step_age_s"], float) and after["step_age_s"] < 60
    page.close()
    os.close(fd)


def test_a_page_of_another_version_or_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "progress").write_bytes(b"x" * progress.PAGE_BYTES)
    with pytest.raises(ValueError, match="not a progress page"):
        progress.open_page(str(tmp_path), writable=False)
    (tmp_path / "progress").write_bytes(b"")
    with pytest.raises(ValueError, match="too small"):
        progress.open_page(str(tmp_path), writable=False)
    with pytest.raises(OSError, match="No such file"):
        progress.open_page(str(tmp_path / "nothing"), writable=False)


def test_a_rank_that_cannot_have_a_page_is_still_seen_from_outside(tmp_path: Path) -> None:
    page = RankPage(3, str(tmp_path / "a directory that is not there"))
    sample = page.sample(os.getpid())
    assert (sample.rank, sample.steps, sample.state) == (3, None, "R")
    assert sample.cpu_s > 0


# --- counting -----------------------------------------------------------------------------------------------------------------------------


def test_nothing_seen_is_unknown_and_not_zero(observed: Observed, tmp_path: Path) -> None:
    assert observed.steps is None


def test_a_step_is_a_step_of_the_optimizer(observed: Observed) -> None:
    optimizer = object()
    for _ in range(7):
        observed.step(optimizer)
    assert observed.steps == 7


def test_two_optimizers_in_turn_make_one_step_together(observed: Observed) -> None:
    """A GAN; or one optimizer for each parameter, that steps within backward."""
    generator, discriminator = object(), object()
    for _ in range(5):
        observed.step(discriminator)
        observed.step(generator)
    assert observed.steps == 5


def test_one_that_steps_more_often_than_the_other_sets_the_pace(observed: Observed) -> None:
    generator, discriminator = object(), object()
    for _ in range(4):
        for _ in range(5):
            observed.step(discriminator)
        observed.step(generator)
    assert observed.steps == 20


def test_an_optimizer_that_is_made_anew_goes_on_counting(observed: Observed) -> None:
    """Or a job that makes one for each epoch would seem to stand still until it has caught up with itself."""
    optimizers = [object() for _ in range(3)]
    for optimizer in optimizers:
        for _ in range(10):
            observed.step(optimizer)
    assert observed.steps is not None
    assert 28 <= observed.steps <= 30


def test_a_forked_child_is_not_the_rank(observed: Observed) -> None:
    observed.step(optimizer := object())
    observed.observer.stop()
    observed.step(optimizer)
    assert observed.steps == 1


class FakeLoader:
    """One iterator over a loader, as torch's look."""

    def __init__(self, batch_size: int) -> None:
        self._index_sampler = type("Sampler", (), {"batch_size": batch_size})()

    def next(self) -> str:
        return "batch"


def test_samples_are_those_of_the_batches_that_led_to_a_step(observed: Observed) -> None:
    """What an evaluation reads belongs to no step."""
    fetch = observed.observer.wrap_next(FakeLoader.next)
    train, evaluate, optimizer = FakeLoader(32), FakeLoader(1000), object()
    for _ in range(3):
        assert fetch(train) == "batch"
        observed.step(optimizer)
    for _ in range(10):
        fetch(evaluate)
    for _ in range(2):
        fetch(train)  # gradients of two batches for one step
    observed.step(optimizer)
    assert observed.page.hot[progress.H_SAMPLES] == 5 * 32
    assert observed.page.hot[progress.H_BATCHES] == 15


def test_the_wait_is_seen_while_it_lasts_and_ends_with_an_exception(observed: Observed) -> None:
    def stuck(_: object) -> None:
        seen.append(look())
        raise StopIteration

    def look() -> dict[str, object]:
        return read_page(observed.page, time.monotonic_ns())

    seen: list[dict[str, object]] = []
    observed.writable.words[progress.W_PID] = os.getpid()
    with pytest.raises(StopIteration):
        observed.observer.wrap_next(stuck)(FakeLoader(1))
    assert seen[0]["waiting_s"] is not None
    assert look()["waiting_s"] is None
    assert look()["batch_age_s"] is None, "the end of the data is no batch"


def test_batches_of_another_thread_are_counted_and_no_wait(observed: Observed) -> None:
    """Somebody's own prefetching: what training waits for is not seen here, that the thread gets on is."""
    fetch = observed.observer.wrap_next(lambda _: seen.append(observed.page.read_hot()))
    seen: list[Sequence[float]] = []
    thread = threading.Thread(target=fetch, args=(FakeLoader(4),))
    thread.start()
    thread.join()
    assert seen[0][progress.H_WAIT_BEGAN_S] == 0
    assert observed.page.hot[progress.H_BATCHES] == 1
    assert observed.page.hot[progress.H_BATCH_AT_S] > 0


def test_a_loader_that_reads_from_another_one_is_one_wait_and_one_batch(observed: Observed) -> None:
    inner = observed.observer.wrap_next(FakeLoader.next)
    outer = observed.observer.wrap_next(lambda _: inner(FakeLoader(4)))
    assert outer(FakeLoader(8)) == "batch"
    observed.step(object())
    assert observed.page.hot[progress.H_BATCHES] == 1
    assert observed.page.hot[progress.H_SAMPLES] == 8


def test_an_iterator_that_lies_where_the_last_one_lay_is_another_one(observed: Observed) -> None:
    """A loop that was left, and then an evaluation: the interpreter gives its iterator the same place, as a rule."""

    class Iterator(FakeLoader):
        __init__ = observed.observer.wrap_init(FakeLoader.__init__)

    fetch, optimizer = observed.observer.wrap_next(FakeLoader.next), object()
    iterator = Iterator(4)
    for batch_size in (4, 1000, 4):
        iterator.__init__(batch_size)
        fetch(iterator)
        if batch_size == 4:
            observed.step(optimizer)
    assert observed.page.hot[progress.H_SAMPLES] == 8


@pytest.mark.parametrize("takes", ["tensors, grad_tensors=None", "*args, **kwargs"])
def test_backward_of_another_torch_is_given_what_it_was_given(observed: Observed, takes: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def backward({takes}): return sorted(locals().items())", namespace)
    original = namespace["backward"]
    wrapped = observed.observer.wrap_backward(original)
    assert wrapped(1) == original(1)
    assert wrapped(1, grad_tensors=2) == original(1, grad_tensors=2)


# --- in a program -------------------------------------------------------------------------------------------------------------------------

FAKE_TORCH = {
    "torch/__init__.py": "import torch.autograd",
    "torch/autograd/__init__.py": "def backward(x, retain=False): return (x, retain)",
    "torch/optim/__init__.py": "import torch.optim.optimizer",
    "torch/optim/optimizer.py": "hooks = []\ndef register_optimizer_step_post_hook(hook): hooks.append(hook)",
}


@pytest.mark.parametrize("is_there_before", [False, True], ids=["imported-later", "imported-before"])
def test_hooks_go_in_when_the_program_imports_torch_and_leave_no_trace(tmp_path: Path, is_there_before: bool) -> None:
    """A forked rank has torch before it begins; a script that never imports torch never has it imported for it."""
    for name, text in FAKE_TORCH.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    fd = progress.create()
    os.symlink(f"/proc/{os.getpid()}/fd/{fd}", tmp_path / "progress")
    first = "import torch, torch.optim" if is_there_before else ""
    script = f"""
import json, sys
{first}
namespace = {{"__name__": "_railhead_observer", "__file__": {str(INSTRUMENT)!r}}}
exec(compile(open({str(INSTRUMENT)!r}).read(), "instrument.py", "exec", dont_inherit=True), namespace)
observer = namespace["begin"]({str(tmp_path)!r})
has_torch = "torch" in sys.modules
import torch, torch.optim
optimizer = torch.optim.optimizer
for _ in range(3):
    for hook in optimizer.hooks: hook(optimizer, (), {{}})
print(json.dumps({{
    "has_torch": has_torch,
    "hooks": len(optimizer.hooks),
    "loader": type(optimizer.__spec__.loader).__name__,
    "same": optimizer.__loader__ is optimizer.__spec__.loader,
    "ours": [name for name in sys.modules if "launcher" in name or "railhead" in name or "observer" in name],
    "backward": torch.autograd.backward("x", retain=True),
    "name": torch.autograd.backward.__name__,
}}))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    page = progress.Page(fd, writable=False)
    steps = page.hot[progress.H_STEPS]
    page.close()
    os.close(fd)
    assert json.loads(done.stdout) == {
        "has_torch": is_there_before,
        "hooks": 1,
        "loader": "SourceFileLoader",
        "same": True,
        "ours": [],
        "backward": ["x", True],
        "name": "backward",
    }
    assert done.stderr == ""
    assert steps == 3


TRAINS = """
import os, sys, torch, torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
import warnings; warnings.simplefilter("error")
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for (x,) in DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4, num_workers=1):
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print([name for name in sys.modules if name.startswith(("launcher", "_railhead"))])
from launcher import expect_steps, pause_watch
expect_steps(100, done=5)
with pause_watch():
    open(f"paused.{os.environ['RANK']}", "w").close()
    while not os.path.exists("go"): pass
dist.barrier()
os._exit(7 if os.environ["RANK"] == "1" else 0)
"""


def test_an_unmodified_ddp_script_is_counted_and_its_words_are_heard(tmp_path: Path) -> None:
    """With workers that are forked, and warnings as errors: nothing of ours may make a program speak that was silent."""
    with launch(tmp_path, TRAINS, "--nproc-per-node", "2") as launched:
        launched.wait_for_file("paused.0", "paused.1")
        page = progress.open_page(str(launched.run_dir / "attempt_0" / "rank_1"), writable=False)
        words, batches = list(page.words[:10]), page.hot[progress.H_BATCHES]
        page.close()
        (tmp_path / "go").touch()
        code, out, err = launched.finish()
        steps = {entry.fields["rank"]: entry.fields["steps"] for entry in launched.journal("RankExited")}
    assert code == 7, err
    assert out == "[rank0] []\n"
    assert steps == {0: 10, 1: 10}
    assert batches == 10
    assert (words[progress.W_TOTAL_STEPS], words[progress.W_DONE_STEPS], words[progress.W_NUM_PAUSES]) == (100, 5, 1)
    assert words[progress.W_PAUSED_SINCE_NS] > 0


LOADER = """
class _BaseDataLoaderIter:
    def __next__(self): return self.fetch()
    def fetch(self): raise KeyError("sample 7")
"""


@pytest.mark.parametrize("how", ["spawn", "fork"])
def test_an_exception_that_passes_a_hook_has_the_traceback_that_it_has_without_us(tmp_path: Path, how: str) -> None:
    """A data set that fails: people compare tracebacks, and search for their lines."""
    files = {
        "torch/utils/__init__.py": "",
        "torch/utils/data/__init__.py": "",
        "torch/utils/data/dataloader.py": LOADER,
    }
    for name, text in (FAKE_TORCH | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = """
import os, sys
sys.path.insert(0, os.getcwd())
for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]: del sys.modules[name]
import torch.utils.data.dataloader as dataloader
next(dataloader._BaseDataLoaderIter())
"""
    with launch(tmp_path, script, "--start-method", how) as launched:
        code, _, err = launched.finish()
        log = (launched.run_dir / "attempt_0" / "rank_0" / "stderr.log").read_text()
    alone = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    ).stderr
    assert (code, log) == (1, alone), err
    assert "instrument" not in err
    assert "KeyError: 'sample 7'" in err


COMPILES = """
import sys, warnings, torch, torch._dynamo
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

def epoch():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    @torch.compile(backend="eager")
    def step(batches):
        (x,) = next(batches)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    batches = iter(DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        losses = [float(step(batches)) for _ in range(4)]
    said = {str(warning.message)[:80] for warning in warned}
    return said, (losses, dict(counters["stats"]), len(counters["graph_break"]))

said_before, before = epoch()
namespace = {"__name__": "_railhead_observer", "__file__": sys.argv[1]}
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec", dont_inherit=True), namespace)
namespace["begin"](sys.argv[2])
said, after = epoch()
assert after == before, (before, after)
assert said <= said_before, said - said_before
"""


def test_torchs_compiler_makes_of_a_whole_step_what_it_makes_without_us(tmp_path: Path) -> None:
    """The same graphs, no warning, no import of a module of ours; and the steps are counted."""
    fd = progress.create()
    os.symlink(f"/proc/{os.getpid()}/fd/{fd}", tmp_path / "progress")
    done = subprocess.run(
        [sys.executable, "-c", COMPILES, str(INSTRUMENT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    page = progress.Page(fd, writable=False)
    steps, samples = page.hot[progress.H_STEPS], page.hot[progress.H_SAMPLES]
    page.close()
    os.close(fd)
    assert done.returncode == 0, done.stderr
    assert (steps, samples) == (4, 16)


def test_steps_that_a_script_counts_itself_are_believed_and_no_others(tmp_path: Path) -> None:
    """JAX, NumPy, a captured CUDA graph: what torch's optimizers do beside it is not training. A child of the rank counts nothing."""
    script = """
import os
from launcher import count_step
from torch.optim.optimizer import hooks
for hook in hooks: hook(hooks, (), {})
for _ in range(3): count_step(samples=8)
if not (child := os.fork()):
    count_step()
    os._exit(0)
os.waitpid(child, 0)
open("counted", "w").close()
while not os.path.exists("go"): pass
"""
    for name, text in FAKE_TORCH.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with launch(tmp_path, "import sys; sys.path.insert(0, '.')" + script, "--start-method", "spawn") as launched:
        launched.wait_for_file("counted")
        page = progress.open_page(str(launched.run_dir / "attempt_0" / "rank_0"), writable=False)
        known = read_page(page, time.monotonic_ns())
        page.close()
        (tmp_path / "go").touch()
        code, _, err = launched.finish()
        (exited,) = launched.journal("RankExited")
    assert code == 0, err
    assert (known["steps"], known["samples"]) == (3, 24)
    assert known["step_age_s"] is not None and known["step_s"] is not None
    assert exited.fields["steps"] == 3


def test_without_the_launcher_a_script_may_say_it_all_the_same() -> None:
    script = """
import sys
from launcher import count_step, expect_steps, pause_watch
count_step()
with pause_watch(): expect_steps(10, done=10)
try: expect_steps(3, done=4)
except ValueError as error: print(error)
print({"torch", "ray", "numpy"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "expect_steps(3, done=4): not 0 <= done <= total\nset()\n"
