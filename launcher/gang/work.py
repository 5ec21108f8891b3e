"""What a stack says by itself: this waits for other ranks, this is known to take its time. Pure.

A frame is `function (file:line)`, innermost first. Whoever is known to be at work is never named in seconds, however still it stands:
an evaluation in one call, a checkpoint that is flushed, a compiler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUM_INNER = 4
"""A collective is at the inner end. Further out, `torch/distributed/` is on every stack of a wrapped model."""

_COLLECTIVE = re.compile(
    r"\((?:.*/)?torch/distributed/(?:distributed_c10d|_functional_collectives|nn/functional|_symmetric_memory/[^:]*"
    r"|fsdp/_fully_shard/_fsdp_collectives)\.py:"
    r"|\((?:.*/)?filelock/_api\.py:"
)
"""Or a lock file: one rank downloads or tokenises, and those of its node wait for it."""

_COMPILES = re.compile(
    r"\((?:.*/)?(?:torch/_dynamo/(?:convert_frame|symbolic_convert)\.py|torch/_inductor/(?:scheduler|graph|async_compile|lowering)\.py"
    r"|torch/utils/cpp_extension\.py|triton/(?:compiler/|backends/|runtime/autotuner)|numba/core/|jax/_src/(?:compiler|interpreters/mlir)\.py)"
)
"""Not `eval_frame.py` and its like, which are on the stack of all code that was compiled."""

_SAVES = re.compile(
    r"\((?:.*/)?(?:torch/serialization\.py|torch/distributed/checkpoint/|safetensors/|pickle\.py|shutil\.py|tarfile\.py|zipfile\.py)"
    r"|^(?:fsync|_save|save) \("
)
_TALKS = re.compile(
    r"\((?:.*/)?(?:ssl\.py|http/client\.py|urllib/request\.py|urllib3/|requests/|httpx/|httpcore/|aiohttp/|botocore/|s3transfer/|boto3/"
    r"|huggingface_hub/|fsspec/|s3fs/|wandb/|mlflow/|subprocess\.py)"
)
_WORDS = frozenset(
    {"eval", "evaluate", "evaluates", "evaluation", "val", "validate", "validates", "validation", "test", "estimate"}
    | {"metric", "metrics", "score", "predict", "generate", "inference", "benchmark", "export"}
    | {"checkpoint", "checkpoints", "ckpt", "save", "saves", "saving", "upload", "download"}
    | {"compile", "compiles", "compiling"}
)
"""In names of functions, as words: `run_validation`, `save_checkpoint`. Not `load`: batches are loaded."""
IMPORT_MACHINERY = "(<frozen importlib."
"""In frames of the interpreter's own import."""
_NOT_WITH = frozenset({"train", "fit"})
"""`train_and_evaluate` is the whole program."""


def is_collective(frames: Sequence[str]) -> bool:
    """Whether it waits for other ranks. Backward counts where nothing of Python's is above it: there gradients are reduced.

    >>> is_collective(("_engine_run_backward (torch/autograd/graph.py:869)", "backward (torch/_tensor.py:630)", "<module> (train.py:9)"))
    True
    >>> is_collective(("all_reduce (torch/distributed/distributed_c10d.py:3021)", "wrapper (torch/distributed/c10d_logger.py:83)"))
    True
    >>> is_collective(("acquire (filelock/_api.py:344)", "__enter__ (filelock/_api.py:376)", "prepare (data.py:9)"))
    True
    >>> is_collective(("evaluate (train.py:30)", "forward (torch/distributed/fsdp/fully_sharded_data_parallel.py:9)"))
    False
    """
    return any(_COLLECTIVE.search(frame) for frame in frames[:_NUM_INNER]) or innermost_is(
        frames, "_engine_run_backward"
    )


def is_between_two(frames: Sequence[str]) -> bool:
    """It waits for one other rank (a pipeline's neighbour), not for all.

    >>> is_between_two(("recv (torch/distributed/distributed_c10d.py:2600)",))
    True
    """
    two = ("recv (", "send (", "irecv (", "isend (", "batch_isend_irecv (", "recv_object_list (", "send_object_list (")
    return any(frame.startswith(two) for frame in frames[:_NUM_INNER])


def innermost_is(frames: Sequence[str], function: str) -> bool:
    return bool(frames) and frames[0].startswith(f"{function} (")


def imports(frames: Sequence[str]) -> bool:
    """Whether this thread is in an import.

    >>> imports(("join (threading.py:9)", "<module> (a.py:5)", "_find_and_load (<frozen importlib._bootstrap>:9)", "<module> (t.py:1)"))
    True
    >>> imports(("<module> (t.py:1)",))
    False
    """
    return any(IMPORT_MACHINERY in frame for frame in frames)


def waits_for_lock(frames: Sequence[str]) -> bool:
    """Whether this thread waits for another one's import. (py-spy names the class, faulthandler does not.)

    >>> waits_for_lock(("_ModuleLock.acquire (<frozen importlib._bootstrap>:120)", "<module> (b.py:1)"))
    True
    """
    return bool(frames) and frames[0].startswith(("_ModuleLock.acquire (<fr", "acquire (<fr")) and imports(frames[:1])


def is_import_locked(main: Sequence[str], others: Sequence[Sequence[str]]) -> bool:
    """Whether the main thread is in an import and another thread waits for one, or the other way round."""
    if not imports(main):
        return False
    return any(waits_for_lock(frames) for frames in others) or (waits_for_lock(main) and any(map(imports, others)))


def known_work(main: Sequence[str], others: Iterable[Sequence[str]] = ()) -> str:
    """What this rank is known to take its time for, in a word; empty if nothing is known. `main`: frames of the main thread; `others`: of
    all the other threads (backward runs in one, and may compile there).

    >>> known_work(("fsync (train.py:30)",)), known_work(("forward (model.py:3)", "run_validation (train.py:7)"))
    ('saves', 'evaluates')
    >>> known_work(("spin (train.py:30)", "train_and_evaluate (train.py:50)"))
    ''
    >>> known_work(("_engine_run_backward (torch/autograd/graph.py:8)",), [("run (torch/_inductor/scheduler.py:7)",)])
    'compiles'
    """
    if any(_COMPILES.search(frame) for frames in (main, *others) for frame in frames):
        return "compiles"
    if any(_SAVES.search(frame) for frame in main):
        return "saves"
    if any(_TALKS.search(frame) for frame in main):
        return "talks"
    if any(_is_telling(frame.partition(" (")[0]) for frame in main) or _is_without_gradients(main):
        return "evaluates"
    return ""


def _is_without_gradients(frames: Sequence[str]) -> bool:
    """Within a function of the script's that is decorated with `torch.no_grad()` or `inference_mode()`.

    >>> _is_without_gradients(("losses (train.py:9)", "decorate_context (torch/utils/_contextlib.py:120)"))
    True
    >>> _is_without_gradients(("step (torch/optim/lbfgs.py:9)", "decorate_context (torch/utils/_contextlib.py:120)"))
    False
    """
    return any(
        frame.startswith("decorate_context (") and "(torch/" not in frames[idx - 1]
        for idx, frame in enumerate(frames)
        if idx
    )


def _is_telling(function: str) -> bool:
    words = set(re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", function).lower()))
    return bool(words & _WORDS) and not words & _NOT_WITH
