"""The environment of a rank: torchrun's values, the user's word, a reason for each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import NodeError
from launcher.gang.events import AttemptPlan, StoreAddress
from launcher.gang.masking import MASK, masked
from launcher.gang.rank_env import RankPlaces, account, apply, settings
from launcher.gang.world import NodeInfo, World
from launcher.spec import JobSpec, Program, ProgramKind, RestartBudget

WORLD = World((NodeInfo("a", "hosta", "10.0.0.1", 2), NodeInfo("b", "hostb", "10.0.0.2", 2)))
PLAN = AttemptPlan(1, WORLD, StoreAddress("10.0.0.1", 29400))
SPEC = JobSpec(
    Program(ProgramKind.SCRIPT, "train.py"), 2, 2, 2, restarts=RestartBudget(3), role="trainer", run_id="job7"
)
PLACES = RankPlaces("/run", "/run/error.json")


def env_of(rank: int, base: dict[str, str], spec: JobSpec = SPEC, places: RankPlaces = PLACES) -> dict[str, str]:
    return apply(settings(spec, PLAN, WORLD.member(rank), places, base), base)


def test_a_rank_gets_exactly_torchruns_variables_and_ours() -> None:
    assert env_of(3, {}) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "ROLE_RANK": "3",
        "ROLE_NAME": "trainer",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "4",
        "GROUP_WORLD_SIZE": "2",
        "ROLE_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29400",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "TORCHELASTIC_RUN_ID": "job7",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_ERROR_FILE": "/run/error.json",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "OMP_NUM_THREADS": "1",
        "RAILHEAD_RUN_DIR": "/run",
        "RAILHEAD_ATTEMPT": "1",
    }


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_VISIBLE_DEVICES", "NODE_RANK"]
)
def test_what_the_user_has_set_stays(name: str) -> None:
    assert env_of(0, {name: "7", "HOME": "/root"})[name] == "7"


def test_one_rank_on_a_node_may_use_all_its_threads() -> None:
    """As torchrun: OMP_NUM_THREADS is only for ranks that share a node."""
    world = World((NodeInfo("a", "hosta", "10.0.0.1", 1),))
    plan = AttemptPlan(0, world, PLAN.store)
    assert "OMP_NUM_THREADS" not in apply(settings(SPEC, plan, world.member(0), PLACES, {}), {})


def test_the_cache_socket_is_set_only_where_there_is_a_cache() -> None:
    assert "RAILHEAD_CACHE_SOCKET" not in env_of(0, {})
    assert env_of(0, {}, places=replace(PLACES, cache_socket="/s"))["RAILHEAD_CACHE_SOCKET"] == "/s"


@pytest.mark.parametrize(("visible", "expected"), [(None, "1"), ("4,5", "5"), ("GPU-aa, GPU-bb", "GPU-bb")])
def test_virtual_local_rank_shows_each_rank_its_own_gpu_as_device_0(visible: str | None, expected: str) -> None:
    base = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    env = env_of(3, base, replace(SPEC, virtual_local_rank=True))
    assert (env["LOCAL_RANK"], env["CUDA_VISIBLE_DEVICES"]) == ("0", expected)


def test_virtual_local_rank_without_enough_gpus_says_how_many_there_are() -> None:
    with pytest.raises(NodeError, match="CUDA_VISIBLE_DEVICES=4 names 1"):
        env_of(3, {"CUDA_VISIBLE_DEVICES": "4"}, replace(SPEC, virtual_local_rank=True))


def test_every_setting_has_a_reason_and_the_account_hides_secrets() -> None:
    base = {"HF_TOKEN": "hf_abc", "HOME": "/root", "RANK": "99"}
    told = account(settings(SPEC, PLAN, WORLD.member(0), PLACES, base), base)
    assert all(entry["reason"] for entry in told["set"])  # type: ignore[attr-defined]
    assert told["inherited"] == {"HF_TOKEN": MASK, "HOME": "/root"}


SECRETS = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "wandb_api_key",
    "DB_PASSWORD",
    "SENTRY_DSN",
    "HTTP_AUTHORIZATION",
]


@given(st.sampled_from(SECRETS), st.text(min_size=1))
def test_what_is_named_like_a_secret_is_never_written(name: str, value: str) -> None:
    assert masked({name: value}) == {name: MASK}
