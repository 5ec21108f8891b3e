"""Jobs for the tests, by hand and by hypothesis."""

from __future__ import annotations

import copy
import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode, CacheVolume, Preload, Scheduler, ScheduleWith, Submission
from launcher.k8s.entrypoint import NOT_SAID, flag_of
from launcher.k8s.fabric import FABRICS
from launcher.k8s.manifest import Rendered, render
from launcher.k8s.options import CACHE_PATH, CacheSettings, KubeJob, KubeOptions, SecretVariable
from launcher.options.table import BY_NAME
from launcher.spec import (
    CacheOptions,
    JobSpec,
    LogOptions,
    Program,
    ProgramKind,
    Resources,
    RestartBudget,
    Stream,
    StreamChoice,
)

IMAGE = "registry.example/train:1.4"
CACHE_1TB = CacheOptions(CACHE_PATH, "1TiB")


def spec(**changes: Any) -> JobSpec:
    return JobSpec(
        **{
            "program": Program(ProgramKind.SCRIPT, "train.py"),
            "min_nodes": 2,
            "max_nodes": 2,
            "nproc_per_node": 8,
            **changes,
        }
    )


def kube(**changes: Any) -> KubeOptions:
    return KubeOptions(**{"name": "resnet", "image": IMAGE, "gpus": 8, "cpus": 80.0, "memory": "512Gi", **changes})


def job(spec_changes: Mapping[str, Any] | None = None, **changes: Any) -> KubeJob:
    return KubeJob(spec(**(spec_changes or {})), kube(**changes))


def with_sidecar(**changes: Any) -> KubeJob:
    return job({"cache": CACHE_1TB}, **{"cache": CacheSettings(CacheMode.SIDECAR), **changes})


def ray_job(rendered: Rendered) -> dict[str, Any]:
    return copy.deepcopy(next(one for one in rendered.objects if one["kind"] == "RayJob"))


def good() -> dict[str, Any]:
    """A RayJob with everything in it, which the tests spoil one rule at a time."""
    return ray_job(render(with_sidecar()))


def group(one: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = one["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return found


def worker(one: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group(one)["template"]["spec"]
    return found


def head(one: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = one["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return found


# Generated jobs. Only what may be combined: refusals have tests of their own.

_words = st.text(
    st.characters(codec="utf-8", exclude_characters="\n\r\0", exclude_categories=("Cs", "Cc")), max_size=12
)
_names = st.from_regex(r"[a-z]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
_streams = st.one_of(
    st.sampled_from(list(Stream)).map(StreamChoice),
    st.dictionaries(st.integers(0, 15), st.sampled_from(list(Stream)), min_size=1).map(
        lambda found: StreamChoice(by_local_rank=tuple(found.items()))
    ),
)


SAMPLES: Mapping[str, Sequence[Any]] = {
    "signals_to_handle": [("SIGTERM",)],
    "resources.per_node": [(("rdma", 1.0),)],
    "logs.redirects": [StreamChoice(Stream.BOTH)],
    "logs.tee": [StreamChoice(Stream.STDOUT)],
    "logs.line_prefix_template": ["-[${rank}] "],
    "logs.show_ranks": [frozenset({0})],
    "metrics": ["0.0.0.0:9400"],
}
"""Values of fields whose type does not tell what they may be. A new `str` whose flag lists its words (`auto|none`) needs no entry."""


def said_fields(kind: Any = JobSpec, parent: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every field that must reach the cluster: path, field and type."""
    hints = typing.get_type_hints(kind)
    for one in fields(kind):
        path = f"{parent}{one.name}"
        if path in NOT_SAID:
            continue
        if is_dataclass(hints[one.name]) and hints[one.name] is not StreamChoice:
            yield from said_fields(hints[one.name], f"{path}.")
        else:
            yield path, one, hints[one.name]


def others(path: str, one: Field[Any], kind: Any) -> list[Any]:
    """Values of this field that are not its default, and that a JobSpec takes."""
    default = one.default if one.default is not MISSING else None
    return [
        value
        for value in SAMPLES.get(path) or _of_type(path, kind)
        if value != default and changed(spec(), path, value) is not None
    ]


def changed(base: JobSpec, path: str, value: Any) -> JobSpec | None:
    """The job with this field changed; None if it then contradicts itself."""
    first, _, rest = path.partition(".")
    try:
        inner = replace(getattr(base, first), **{rest: value}) if rest else value
        return replace(base, **{first: inner})
    except SpecError:
        return None


def _of_type(path: str, kind: Any) -> Sequence[Any]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, enum.Enum):
        return list(origin)
    words = BY_NAME[flag_of(path) or "role"].metavar.split("|")
    by_type: dict[Any, Sequence[Any]] = {
        bool: (True, False),
        int: (1, 7),
        float: (0.5, 120.0),
        str: [word for word in words if word.islower()] or ["x1"],
        frozenset: (frozenset({0, 2}),),
        tuple: (("a", "b"),),
    }
    return by_type[origin]


@st.composite
def specs(draw: st.DrawFn) -> JobSpec:
    """Any job. Fields that are not drawn by hand here are drawn by their type, so a new one is tried at once."""
    one = draw(_specs_by_hand())
    for path, field_, kind in said_fields():
        if path not in _BY_HAND:
            found = draw(st.none() | st.sampled_from(others(path, field_, kind)).map(lambda value: (value,)))
            one = one if found is None else changed(one, path, found[0]) or one
    return one


_BY_HAND = {
    *("resources.cpus_per_proc", "resources.gpus_per_proc", "resources.per_node", "restarts.max_restarts"),
    *("logs.log_dir", "logs.show_ranks", "logs.redirects", "logs.tee", "logs.local_ranks_filter"),
    *("logs.line_prefix_template", "logs.duplicate_stdout_filters", "role", "run_id", "master_port"),
    *("virtual_local_rank", "shutdown_timeout_s", "place_timeout_s", "signals_to_handle"),
}


@st.composite
def _specs_by_hand(draw: st.DrawFn) -> JobSpec:
    least = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(ProgramKind))
    show_all = draw(st.booleans())
    most = least + draw(st.integers(0, 3))
    each = draw(st.sampled_from([1, 2, 4, 8]))
    ranks = st.frozensets(st.integers(0, most * each - 1), max_size=4)
    return JobSpec(
        program=Program(
            kind,
            draw(st.sampled_from(["train.py", "a/b c.py", "-odd", "it's"])),
            tuple(draw(st.lists(_words, max_size=4))),
        ),
        min_nodes=least,
        max_nodes=most,
        nproc_per_node=each,
        resources=Resources(
            draw(st.sampled_from([None, 0.5, 2.0])),
            draw(st.sampled_from([None, 0.5, 1.0])),
            draw(st.sampled_from([(), (("rdma", 1.0),)])),
        ),
        restarts=RestartBudget(draw(st.integers(0, 9))),
        logs=LogOptions(
            log_dir=draw(st.none() | st.sampled_from(["/railhead/runs", "-x", "a b"])),
            show_all=show_all,
            show_ranks=None if show_all else draw(st.none() | ranks),
            redirects=draw(_streams),
            tee=draw(_streams),
            local_ranks_filter=draw(st.none() | st.frozensets(st.integers(0, 9), min_size=1, max_size=3)),
            line_prefix_template=draw(st.none() | st.just("-[${rank}] ")),
            duplicate_stdout_filters=draw(st.sampled_from([(), ("loss", "a,b")])),
        ),
        role=draw(st.sampled_from(["default", "trainer"])),
        run_id=draw(st.sampled_from(["none", "r1"])),
        master_port=draw(st.none() | st.integers(1, 65535)),
        virtual_local_rank=draw(st.booleans()),
        shutdown_timeout_s=draw(st.sampled_from([30.0, 0.5, 120.0])),
        place_timeout_s=draw(st.sampled_from([300.0, 7200.0])),
        signals_to_handle=draw(st.sampled_from([JobSpec.signals_to_handle, ("SIGTERM",)])),
    )


@st.composite
def jobs(draw: st.DrawFn) -> KubeJob:
    mode = draw(st.sampled_from(CacheMode))
    base = draw(specs())
    if mode is not CacheMode.NONE:
        base = JobSpec(
            **{**vars(base), "cache": CacheOptions(CACHE_PATH, draw(st.sampled_from(["64MiB", "500GB", "1.5TiB"])))}
        )
    data = ("s3://bucket/train",) if mode is not CacheMode.NONE and draw(st.booleans()) else ()
    scheduler = draw(st.sampled_from(Scheduler))
    submission = Submission.SIDECAR if scheduler is Scheduler.KAI else draw(st.sampled_from(Submission))
    fabric = draw(st.sampled_from(list(FABRICS)))
    schedule = draw(st.none() | st.just("0 2 * * *"))
    return KubeJob(
        base,
        KubeOptions(
            name=draw(_names),
            image=IMAGE,
            gpus=8,
            cpus=draw(st.sampled_from([80.0, 190.0])),
            memory=draw(st.sampled_from(["64Gi", "1Ti"])),
            labels=draw(st.sampled_from([{}, {"team": "vision"}])),
            image_pull_secrets=draw(st.sampled_from([(), ("pull",)])),
            priority_class=draw(st.none() | st.just("high")),
            instance_type="p5.48xlarge" if fabric == "efa" else None,
            tolerations=draw(st.sampled_from([(), ({"key": "gpu", "operator": "Exists"},)])),
            secret_env=draw(st.sampled_from([(), (SecretVariable("AWS_SECRET_ACCESS_KEY", "s3", "secret"),)])),
            env_from_secrets=draw(st.sampled_from([(), ("s3",)])),
            working_dir=draw(st.none() | st.just("s3://bucket/code.zip")),
            files=draw(st.sampled_from([{}, {"train.py": "print(1)\n"}])),
            claims=draw(st.sampled_from([(), (("checkpoints", "/checkpoints"),)])),
            data=data,
            cache=CacheSettings(
                mode,
                draw(st.sampled_from(CacheVolume)),
                storage_class=draw(st.none() | st.just("fast")),
                preload=draw(st.sampled_from(Preload)) if data else Preload.NONE,
                peers=mode is CacheMode.SIDECAR and draw(st.booleans()),
            ),
            fabric=fabric,
            fabric_networks=("rail-0", "rail-1") if fabric == "roce" else (),
            scheduler=scheduler,
            queue="research" if scheduler is not Scheduler.NONE else None,
            submission=submission,
            autoscale=scheduler is not Scheduler.KUEUE and draw(st.booleans()),
            spot=draw(st.booleans()),
            deadline_s=draw(st.none() | st.just(86400)),
            start_deadline_s=draw(st.none() | st.just(3600)),
            cluster_retries=draw(st.integers(0, 2)),
            schedule=schedule,
            schedule_with=draw(st.sampled_from(ScheduleWith)) if scheduler is Scheduler.NONE else ScheduleWith.CRON_JOB,
            feature_gates=("RayCronJob",),
            disruption_budget=draw(st.booleans()),
            network_policy=fabric not in ("oci", "roce-host") and draw(st.booleans()),
            pod_monitor=draw(st.booleans()),
        ),
    )
