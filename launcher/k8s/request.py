"""What a person asks for, from flags and a job file, as a KubeJob. Files are read through a function that is passed in.

The manifest is a function of the command line and the job file: variables of this terminal are not in it, unless `--env NAME` asks for one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, TypeVar

from launcher.errors import SpecError
from launcher.k8s.flags import BY_NAME, FLAGS
from launcher.k8s.jobfile import RUN_KEY, read_job_file
from launcher.k8s.names import MAX_RAYJOB_NAME, suggest_name
from launcher.k8s.options import CACHE_PATH, CacheMode, CacheSettings, CacheVolume, KubeJob, KubeOptions, Preload
from launcher.options.intent import understand
from launcher.options.parse import CommandLine, Given, find_option, parse
from launcher.options.table import BY_NAME as LAUNCHER_FLAGS
from launcher.options.table import BY_SHORT
from launcher.spec import ProgramKind

T = TypeVar("T")
_NOT_HERE = {
    "address": "the job gets a Ray cluster of its own",
    "standalone": "the job runs on Kubernetes",
    "carry-env": "give variables with --env",
    "cache-dir": "the pod's volume is the cache's directory; --cache-capacity is its size",
}
_FRONTS = (("torchrun",), ("python", "-m", "launcher"), ("python", "-m", "torch.distributed.run"), ("python",))


@dataclass(frozen=True)
class Request:
    """Flags as they were given, Kubernetes' apart from the launcher's."""

    kube: Mapping[str, tuple[Given, ...]] = field(default_factory=dict)
    line: CommandLine = field(default_factory=CommandLine)
    wants_help: bool = False

    def texts(self, name: str) -> tuple[Given, ...]:
        return self.kube.get(name, ())

    def has(self, name: str) -> bool:
        given = self.texts(name)
        return bool(given) and given[-1].value == "true"

    def get(self, name: str, default: Any) -> Any:
        """The flag's value, or the default. A bad one is an error that shows it as it was written, with its line in a job file."""
        given = self.texts(name)
        if not given:
            return default
        return _value(given[-1], BY_NAME[name].parse)

    def all(self, name: str) -> tuple[Any, ...]:
        return tuple(_value(given, BY_NAME[name].parse) for given in self.texts(name))


def cut(argv: Sequence[str], also: Mapping[str, bool] | None = None) -> Request:
    """Cut a command line. `also`: flags of the command itself, name → is it a switch; they come back among `kube`."""
    kube: dict[str, tuple[Given, ...]] = {}
    theirs: list[str] = []
    rest, extra = list(argv), dict(also or {})
    while rest:
        token = rest.pop(0)
        if token in ("-h", "--help"):
            return Request(wants_help=True)
        if token == "--" or not token.startswith("-") or token == "-":
            rest = [token, *rest]
            break
        written, equals, value = token.partition("=")
        name = written[2:].replace("_", "-") if token.startswith("--") else ""
        if name in BY_NAME or name in extra:
            is_switch = extra[name] if name in extra else BY_NAME[name].is_switch
            if not is_switch and not equals:
                if not rest:
                    raise SpecError(
                        f"{written} needs a value, and the command line ends", advice=f"write {written} VALUE"
                    )
                value = rest.pop(0)
            _add(kube, name, Given((value or "true") if is_switch else value, written))
            continue
        _check_known(token, written)
        theirs.append(token)
        if not equals and rest and _takes_value(token):
            theirs.append(rest.pop(0))
    return Request(kube, parse([*theirs, *rest], {}))


def with_job_file(request: Request, text: str, path: str) -> Request:
    """The request over what the job file says: a flag replaces the file's value of the same name."""
    known = [flag.name for flag in FLAGS if flag.name != "file"] + [
        name for name in LAUNCHER_FLAGS if name not in _NOT_HERE
    ]
    lists = [flag.name for flag in FLAGS if flag.is_repeated]
    kube: dict[str, tuple[Given, ...]] = {}
    given: dict[str, Given] = {}
    words: list[str] = []
    for entry in read_job_file(text, path, known, lists):
        source = Given(entry.value, f"{path}:{entry.line}: {entry.key}")
        if entry.key == RUN_KEY:
            words.append(entry.value)
        elif entry.key in BY_NAME:
            _add(kube, entry.key, source)
        elif LAUNCHER_FLAGS[entry.key].is_switch:
            given[entry.key] = replace(source, value="1" if entry.value == "true" else "0")
        else:
            given[entry.key] = source
    run = parse(_without_front(words), {})
    line = request.line
    has_program = line.target is not None
    return Request(
        {**kube, **{name: _over(name, kube.get(name, ()), given) for name, given in request.kube.items()}},
        CommandLine(
            {**given, **run.given, **line.given},
            line.target if has_program else run.target,
            line.args if has_program else run.args,
        ),
    )


def to_job(request: Request, environ: Mapping[str, str], read_text: Callable[[str], str]) -> KubeJob:
    """The job. Raises SpecError; one about a value in a job file begins with its line."""
    for name, reason in _NOT_HERE.items():
        if name in request.line.given:
            raise SpecError(f"{request.line.given[name]}: not here: {reason}", advice=f"leave --{name} out")
    try:
        return _build(request, environ, read_text)
    except SpecError as error:
        raise located(error, request) from error


def located(error: SpecError, request: Request) -> SpecError:
    """An error that names a flag whose value came from a job file, with the line of the first of them in front."""
    for name in re.findall(r"--([a-z][a-z-]+)", error.message):
        given = request.texts(name)
        source = given[-1].source if given else request.line.given[name].source if name in request.line.given else ""
        place = re.match(r"(.+:\d+): ", source)
        if place:
            return SpecError(f"{place[1]}: {error.message}", advice=error.advice)
    return error


def _build(request: Request, environ: Mapping[str, str], read_text: Callable[[str], str]) -> KubeJob:
    capacity = request.line.text("cache-capacity")
    line = request.line
    if capacity is not None:
        line = replace(line, given={**line.given, "cache-dir": Given(CACHE_PATH, "--cache-dir")})
    intent = understand(line, {"RAY_ADDRESS": "auto"}, ".")
    spec = intent.spec
    gpus = _gpus(request, spec.nproc_per_node)
    if intent.procs_wish is not None:
        spec = replace(spec, nproc_per_node=_procs(intent.procs_wish, gpus, request))
    spec = replace(spec, env=_environment(request, environ))
    get = request.get
    kube = KubeOptions(
        name=get("name", None) or _default_name(line),
        image=get("image", None) or _missing("image", "the image that all pods run: --image registry/team/train:1.4"),
        gpus=gpus,
        cpus=get("cpus", float(10 * gpus or spec.nproc_per_node * max(1.0, spec.resources.cpus_per_proc or 1.0))),
        memory=get("memory", f"{64 * gpus or 4 * spec.nproc_per_node}Gi"),
        cache=_cache(request, has_size=capacity is not None, is_alone=spec.max_nodes + spec.spare_nodes == 1),
        files=_files(request, read_text),
        env_from_secrets=request.all("env-from-secret"),
        secret_env=request.all("secret-env"),
        node_selector=dict(request.all("node-selector")),
        tolerations=request.all("toleration"),
        labels=dict(request.all("label")),
        data=request.all("data"),
        claims=request.all("claim"),
        spot=request.has("spot"),
        autoscale=request.has("autoscale"),
        network_policy=request.has("network-policy"),
        pod_monitor=request.has("pod-monitor"),
        disruption_budget=not request.has("no-disruption-budget"),
        **_plain(request),
    )
    return KubeJob(spec, kube)


# Flags whose value is a field as it is: flag → field.
_PLAIN = {
    "namespace": "namespace",
    "ray-version": "ray_version",
    "kuberay": "kuberay",
    "feature-gates": "feature_gates",
    "shm": "shm",
    "gpu-resource": "gpu_resource",
    "head-cpus": "head_cpus",
    "head-memory": "head_memory",
    "image-pull-secrets": "image_pull_secrets",
    "image-pull-policy": "image_pull_policy",
    "run-as-user": "run_as_user",
    "service-account": "service_account",
    "priority-class": "priority_class",
    "instance-type": "instance_type",
    "working-dir": "working_dir",
    "fabric": "fabric",
    "fabric-resource": "fabric_resource",
    "fabric-networks": "fabric_networks",
    "fabric-image": "fabric_image",
    "scheduler": "scheduler",
    "queue": "queue",
    "topology": "topology",
    "submission": "submission",
    "grace": "grace_s",
    "deadline": "deadline_s",
    "start-deadline": "start_deadline_s",
    "cluster-retries": "cluster_retries",
    "ttl": "ttl_s",
    "schedule": "schedule",
    "schedule-with": "schedule_with",
    "time-zone": "time_zone",
    "operator-namespace": "operator_namespace",
    "monitoring-namespace": "monitoring_namespace",
}


def _plain(request: Request) -> dict[str, Any]:
    return {field_name: request.get(flag, None) for flag, field_name in _PLAIN.items() if request.texts(flag)}


def _gpus(request: Request, nproc: int) -> int:
    if not request.texts("gpus"):
        raise SpecError(
            "how many GPUs does each worker have? --gpus is missing",
            advice=f"give --gpus {nproc if nproc > 1 else 8}, or --gpus 0 for a job on CPUs",
        )
    return int(request.get("gpus", 0))


def _procs(wish: str, gpus: int, request: Request) -> int:
    if gpus and wish in ("gpu", "auto"):
        return gpus
    if wish == "gpu":
        raise SpecError("--nproc-per-node gpu with --gpus 0", advice="give a number, or --nproc-per-node cpu")
    if not request.texts("cpus"):
        raise SpecError(
            f"--nproc-per-node {wish}: of how many CPUs? --cpus is missing", advice="give --cpus, or a number of ranks"
        )
    return max(1, int(request.get("cpus", 1.0)))


def _cache(request: Request, *, has_size: bool, is_alone: bool) -> CacheSettings:
    get, default = request.get, CacheSettings()
    mode = get("cache", CacheMode.SIDECAR if has_size else CacheMode.NONE)
    return CacheSettings(
        mode=mode,
        volume=get("cache-volume", CacheVolume.EMPTY_DIR),
        storage_class=get("cache-storage-class", None),
        host_path=get("cache-host-path", default.host_path),
        memory=get("cache-memory", default.memory),
        cpus=get("cache-cpus", default.cpus),
        image=get("cache-image", None),
        preload=get("preload", Preload.NONE),
        peers=_has_peers(request, mode, is_alone=is_alone),
        peer_secret=get("cache-peer-secret", None),
        peer_tls_secret=get("cache-peer-tls-secret", None),
    )


def _has_peers(request: Request, mode: CacheMode, *, is_alone: bool) -> bool:
    """Where nothing is said: as soon as there is somebody to share with (docs/decisions/0080-peers-by-default.md)."""
    if request.has("no-cache-peers"):
        if request.has("cache-peers"):
            raise SpecError("--cache-peers and --no-cache-peers contradict each other", advice="keep one of them")
        return False
    if request.texts("cache-peers"):
        return request.has("cache-peers")
    return mode is CacheMode.SIDECAR and not is_alone


def _files(request: Request, read_text: Callable[[str], str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for given in request.texts("ship"):
        for path in given.value.split(","):
            name = PurePath(path).name
            if name in files:
                raise SpecError(
                    f"{given}: two files are called {name}", advice="a ConfigMap is one flat folder; rename one"
                )
            files[name] = read_text(path)
    return files


def _environment(request: Request, environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for given in request.texts("env"):
        name, value = _value(given, BY_NAME["env"].parse)
        if value is None and name not in environ:
            raise SpecError(f"{given}: {name} is not set here", advice=f"set it, or write {name}=VALUE")
        found[name] = environ[name] if value is None else value
    return found


def _default_name(line: CommandLine) -> str:
    """From the script: `train.py` becomes `train`."""
    if line.target is None:
        _missing("name", "what to call the job: --name resnet")
    target = str(line.target)
    stem = PurePath(target).stem if not line.has("module") else target
    return suggest_name(stem or ProgramKind.SCRIPT.value, MAX_RAYJOB_NAME)


def _missing(name: str, what: str) -> str:
    raise SpecError(f"--{name} is missing", advice=f"say {what}")


def _without_front(words: Sequence[str]) -> list[str]:
    """`torchrun … train.py`, `python train.py`: the launcher is what starts it here."""
    plain = ["python" if word in ("python3", "python") and idx == 0 else word for idx, word in enumerate(words)]
    for front in _FRONTS:
        if tuple(plain[: len(front)]) == front:
            return list(words[len(front) :])
    return list(words)


def _over(name: str, of_file: tuple[Given, ...], of_flags: tuple[Given, ...]) -> tuple[Given, ...]:
    """A flag replaces the file's value; what adds up (`--env`) comes after it, so that of one name the flag's counts."""
    return (*of_file, *of_flags) if name in BY_NAME and BY_NAME[name].is_repeated else of_flags


def _add(kube: dict[str, tuple[Given, ...]], name: str, given: Given) -> None:
    is_repeated = name in BY_NAME and BY_NAME[name].is_repeated
    kube[name] = (*kube.get(name, ()), given) if is_repeated else (given,)


def _check_known(token: str, written: str) -> None:
    """Suggests over both tables; the launcher's own parser knows only its own."""
    if not token.startswith("--"):
        return
    try:
        find_option(written)
    except SpecError as error:
        name = written[2:].replace("_", "-")
        close = difflib.get_close_matches(name, [*BY_NAME, *LAUNCHER_FLAGS], n=1, cutoff=0.5)
        if error.message.startswith("no such flag") and close:
            raise SpecError(error.message, advice=f"did you mean --{close[0]}? --help lists all") from error
        raise


def _takes_value(token: str) -> bool:
    if token.startswith("--"):
        return not find_option(token).is_switch
    option = BY_SHORT.get(token[1:2])
    return option is not None and not option.is_switch and len(token) == 2


def _value(given: Given, parse_text: Callable[[str], T]) -> T:
    try:
        return parse_text(given.value)
    except ValueError as error:
        raise SpecError(f"{given}: expected {error}") from error
