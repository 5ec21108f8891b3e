"""Which of the launcher's environment variables go along to the nodes of a cluster.

On one machine ranks inherit everything. On a cluster the nodes have an environment of their own, which describes the node (PATH, HOME,
LD_LIBRARY_PATH, CUDA_VISIBLE_DEVICES) and must not be replaced; what a person exports in front of the command is meant for the training
and is expected there. So settings of libraries go along by prefix, and anything else by `--carry-env NAME,…` (`AWS_*` for the
credentials of the data: nodes often have better ones of their own, so these go along only when asked for).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

PREFIXES = (
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "TORCH",  # TORCH_…, TORCHINDUCTOR_…, TORCHDYNAMO_…
    "PYTORCH_",
    "CUBLAS_",
    "CUDNN_",
    "OMP_",
    "MKL_",
    "TRITON_",
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "WANDB_",
    "MLFLOW_",
    "RAILHEAD_",
)
NAMES = (
    "CUDA_LAUNCH_BLOCKING",
    "PYTHONHASHSEED",
    "PYTHONFAULTHANDLER",
    "PYTHONWARNINGS",
    "PYTHONUNBUFFERED",
    "PYTHONPATH",
    "TZ",
)
# Ray already gives a submitted job's ranks its PYTHONPATH, with the node's own place of the working directory in it.
_LEFT_TO_RAY = ("PYTHONPATH",)
# These describe the launcher's own surroundings: the rank that started it, the run that it is part of.
NEVER = (
    "TORCHELASTIC_",
    "RAILHEAD_RUN_DIR",
    "RAILHEAD_ATTEMPT",
    "RAILHEAD_CACHE_SOCKET",
    "RAILHEAD_CARRY",
    "RAILHEAD_RUNS",
)


def carried_environment(environ: Mapping[str, str], asked: Sequence[str]) -> dict[str, str]:
    """The variables that ranks on other nodes get from here; those `asked` for (names, `*` allowed) in any case.

    >>> carried_environment({"PATH": "/bin", "NCCL_DEBUG": "INFO", "MY_KEY": "k"}, ["MY_KEY"])
    {'MY_KEY': 'k', 'NCCL_DEBUG': 'INFO'}
    >>> carried_environment({"AWS_REGION": "eu-west-1", "AWS_PROFILE": "me"}, ["AWS_*"])
    {'AWS_PROFILE': 'me', 'AWS_REGION': 'eu-west-1'}
    """
    left_to_ray = _LEFT_TO_RAY if "RAY_JOB_CONFIG_JSON_ENV_VAR" in environ else ()
    return {
        name: value
        for name, value in sorted(environ.items())
        if any(fnmatchcase(name, pattern) for pattern in asked) or (_is_setting(name) and name not in left_to_ray)
    }


def _is_setting(name: str) -> bool:
    return (name.startswith(PREFIXES) or name in NAMES) and not name.startswith(NEVER)
