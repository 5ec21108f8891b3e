"""What is rendered is what the cluster takes, and says what the job says."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import Field, dataclass, replace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from launcher.errors import SpecError
from launcher.k8s.choices import CacheMode, CacheVolume, Preload, Scheduler, ScheduleWith, Submission
from launcher.k8s.entrypoint import entrypoint, flag_of, launcher_arguments
from launcher.k8s.manifest import render, to_yaml
from launcher.k8s.options import CacheSettings, KubeJob
from launcher.k8s.pods import ROLE_LABEL
from launcher.options.intent import understand
from launcher.options.parse import parse
from launcher.spec import JobSpec, Program, ProgramKind
from tests.launcher.k8s.jobs import (
    changed,
    head,
    job,
    jobs,
    kube,
    others,
    ray_job,
    said_fields,
    spec,
    specs,
    with_sidecar,
    worker,
)
from tests.launcher.k8s.schemas import faults

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(jobs())
@settings(relaxed, max_examples=200)
def test_every_job_that_can_be_described_renders_to_what_the_api_server_takes(one: KubeJob) -> None:
    """Unknown fields are refused as well: an old or misspelt one would be pruned without a word."""
    for manifest in render(one).objects:
        assert faults(manifest) == []


@given(specs())
@settings(relaxed, max_examples=300)
def test_the_entrypoint_read_as_a_command_line_is_the_same_job(one: JobSpec) -> None:
    """Otherwise a job that works on a laptop would be another one on the cluster."""
    words = shlex.split(entrypoint(one))
    assert words[:3] == ["python", "-m", "launcher"]
    understood = understand(parse(words[3:], {}), {}, ".")
    assert understood.spec == one
    assert understood.address == "auto"


@given(specs())
@settings(relaxed, max_examples=5)
def test_the_submitters_shell_and_rays_shell_hand_the_arguments_on_unchanged(one: JobSpec) -> None:
    """KubeRay pastes the entrypoint into a bash line; `ray job submit` joins the words with shlex.join; Ray runs that in a shell."""
    show = "import sys; sys.stdout.buffer.write(b'\\0'.join(map(__import__('os').fsencode, sys.argv[1:])))"
    environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}

    def through_shell(line: str) -> list[str]:
        python = shlex.join(["python3", "-c", show])
        done = subprocess.run(["bash", "-c", f"{python} {line}"], capture_output=True, check=True, env=environ)
        return done.stdout.decode().split("\0")

    once = through_shell(entrypoint(one))
    assert (
        through_shell(shlex.join(once))
        == once
        == ["python", "-m", "launcher", "--address", "auto", *launcher_arguments(one)]
    )


@pytest.mark.parametrize(("path", "field", "kind"), [*said_fields()], ids=[path for path, _, _ in said_fields()])
def test_every_field_of_a_job_reaches_the_cluster(path: str, field: Field[Any], kind: Any) -> None:
    """Else clusters would run another job than laptops. A new field needs a flag of its name, and nothing here or in launcher.k8s."""
    assert flag_of(path) is not None, (
        f"{path} has no flag; name it in launcher.k8s.entrypoint.FLAG_OF, or in NOT_SAID with the reason"
    )
    values = others(path, field, kind)
    assert values, f"no value of {path} is known; give one in tests/launcher/k8s/jobs.py, SAMPLES"
    for value in values:
        one = changed(spec(), path, value)
        assert one is not None
        assert understand(parse(shlex.split(entrypoint(one))[3:], {}), {}, ".").spec == one


def test_the_launchers_metrics_are_scraped_at_the_head_alone() -> None:
    """It runs there; a worker has no such port and would be down for ever."""
    rendered = render(job({"metrics": "0.0.0.0:9400"}, pod_monitor=True, network_policy=True))
    ray, own = (one for one in rendered.objects if one["kind"] == "PodMonitor")
    assert ROLE_LABEL not in ray["spec"]["selector"]["matchLabels"]
    assert own["spec"]["selector"]["matchLabels"][ROLE_LABEL] == "head"
    (endpoint,) = own["spec"]["podMetricsEndpoints"]
    assert endpoint["relabelings"][0]["replacement"] == "$1:9400"
    policy = next(one for one in rendered.objects if one["kind"] == "NetworkPolicy")
    assert 9400 in [port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])]
    without = render(job(pod_monitor=True)).objects
    assert [one["kind"] for one in without].count("PodMonitor") == 1


def test_a_field_without_a_flag_is_refused_and_not_dropped() -> None:
    @dataclass(frozen=True)
    class Wider(JobSpec):
        moon_phase: str = "new"

    assert entrypoint(Wider(spec().program))
    with pytest.raises(SpecError, match="moon_phase = 'full': no flag"):
        entrypoint(Wider(spec().program, moon_phase="full"))


def test_the_same_job_renders_to_the_same_bytes() -> None:
    """So that a manifest can be checked in and compared."""
    assert to_yaml(render(with_sidecar())) == to_yaml(render(with_sidecar()))
    assert [yaml.safe_load(text) for text in to_yaml(render(with_sidecar())).split("---\n")[1:]] == list(
        render(with_sidecar()).objects
    )


def test_the_cache_sidecar_starts_before_ray_and_its_probes_ask_only_itself() -> None:
    """A sidecar that waited for Ray would keep the pod from starting, for ever."""
    one = ray_job(render(with_sidecar()))
    (sidecar,) = worker(one)["initContainers"]
    assert sidecar["restartPolicy"] == "Always"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert sidecar[kind]["httpGet"]["port"] == sidecar["ports"][0]["name"]
    assert [one["name"] for one in worker(one)["containers"]] == ["ray-worker"]


def test_ray_finds_the_daemons_socket_where_the_sidecar_serves_it() -> None:
    one = ray_job(render(with_sidecar()))
    (sidecar,), (ray,) = worker(one)["initContainers"], worker(one)["containers"]
    told = {entry["name"]: entry["value"] for entry in ray["env"]}["RAILHEAD_CACHE_SOCKET"]
    assert sidecar["args"][sidecar["args"].index("--socket") + 1] == told
    folders = [{m["mountPath"]: m["name"] for m in container["volumeMounts"]} for container in (sidecar, ray)]
    assert folders[0][os.path.dirname(told)] == folders[1][os.path.dirname(told)]


def test_the_cache_volume_is_larger_than_the_cache() -> None:
    """The kubelet evicts a pod whose emptyDir outgrows its limit."""
    volume = next(v for v in worker(ray_job(render(with_sidecar())))["volumes"] if v["name"] == "cache-data")
    mebibytes = int(volume["emptyDir"]["sizeLimit"].removesuffix("Mi"))
    assert mebibytes > 1.04 * 2**20


@pytest.mark.parametrize("volume", CacheVolume)
def test_each_kind_of_cache_volume_is_mounted_by_both(volume: CacheVolume) -> None:
    one = worker(ray_job(render(with_sidecar(cache=CacheSettings(CacheMode.SIDECAR, volume)))))
    serving = [c for c in one["initContainers"] if c["name"] == "cache"]
    for container in (*serving, *one["containers"]):
        assert "cache-data" in {mount["name"] for mount in container["volumeMounts"]}


def test_daemonset_mode_mounts_the_nodes_socket_and_starts_no_daemon() -> None:
    one = worker(ray_job(render(job(cache=CacheSettings(CacheMode.DAEMONSET)))))
    assert "initContainers" not in one
    assert {"name": "cache-run", "hostPath": {"path": "/var/lib/railhead/run", "type": "Directory"}} in one["volumes"]


def test_a_preload_comes_after_the_daemon_and_its_failure_does_not_stop_the_pod() -> None:
    """A failing cache is a slower cache."""
    settings = CacheSettings(CacheMode.SIDECAR, preload=Preload.BEFORE)
    one = worker(ray_job(render(with_sidecar(cache=settings, data=("s3://b/t",)))))
    assert [c["name"] for c in one["initContainers"]] == ["cache", "preload"]
    command = one["initContainers"][1]["command"]
    assert command[3:] == [
        "preload",
        "python",
        "-m",
        "cache",
        "preload",
        "--socket",
        "/railhead/run/cache.sock",
        "--no-verify",
        "s3://b/t",
    ]
    done = subprocess.run([*command[:4], "bash", "-c", "exit 3"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "preload ended with 3: training reads the rest from the origin\n")


def test_a_preload_beside_the_training_stays_after_its_end_and_goes_at_once_on_sigterm() -> None:
    """A container that ended would make its pod unready, and the job would never be submitted."""
    settings = CacheSettings(CacheMode.SIDECAR, preload=Preload.BESIDE)
    one = worker(ray_job(render(with_sidecar(cache=settings, data=("s3://b/t",)))))
    warm = one["initContainers"][1]
    assert warm["restartPolicy"] == "Always"
    with subprocess.Popen(
        [*warm["command"][:4], "echo", "warm"], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["warm\n", "preload ended with 0\n"]
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=10) == 0


def test_gpus_are_limits_and_the_head_has_none() -> None:
    one = ray_job(render(job()))
    assert worker(one)["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    head = one["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert "nvidia.com/gpu" not in str(head)
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_a_shipped_script_is_run_from_where_it_is_mounted() -> None:
    rendered = render(job(files={"train.py": "print('hi')\n"}))
    assert ray_job(rendered)["spec"]["entrypoint"].endswith(" /railhead/code/train.py")
    assert next(one for one in rendered.objects if one["kind"] == "ConfigMap")["data"] == {"train.py": "print('hi')\n"}


def test_a_claim_is_mounted_in_the_workers_where_ranks_write_checkpoints() -> None:
    """Everything else of a pod goes with it."""
    one = ray_job(render(job(claims=(("checkpoints", "/checkpoints"), ("scratch", "/scratch")))))
    mounted = {mount["name"]: mount["mountPath"] for mount in worker(one)["containers"][0]["volumeMounts"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]: mounted[volume["name"]]
        for volume in worker(one)["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {"checkpoints": "/checkpoints", "scratch": "/scratch"}
    with pytest.raises(SpecError, match="/dev/shm"):
        render(job(claims=(("scratch", "/dev/shm"),)))


def test_only_workers_get_the_rights_that_the_fabric_needs() -> None:
    one = ray_job(render(job(fabric="ib")))
    assert worker(one)["securityContext"]["runAsUser"] == 0
    submitter = one["spec"]["submitterPodTemplate"]["spec"]
    assert head(one)["securityContext"]["runAsUser"] == submitter["securityContext"]["runAsUser"] == 1000


def test_the_users_variable_wins_over_ours() -> None:
    one = ray_job(render(job({"env": {"RAILHEAD_RUNS": "/nvme/runs"}})))
    assert [e for e in worker(one)["containers"][0]["env"] if e["name"] == "RAILHEAD_RUNS"] == [
        {"name": "RAILHEAD_RUNS", "value": "/nvme/runs"}
    ]


def test_spot_workers_are_wanted_on_spot_nodes_and_the_head_elsewhere_with_a_budget_of_its_own() -> None:
    rendered = render(job(spot=True))
    one = ray_job(rendered)
    terms = worker(one)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert {expression["operator"] for term in terms for expression in term["matchExpressions"]} == {"In"}
    budget = next(one for one in rendered.objects if one["kind"] == "PodDisruptionBudget")["spec"]
    assert (budget["minAvailable"], budget["selector"]["matchExpressions"][0]["values"]) == (1, ["head"])


def test_with_autoscaling_the_range_is_the_jobs_least_and_most() -> None:
    one = ray_job(render(job({"min_nodes": 2, "max_nodes": 5}, autoscale=True)))
    group = one["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 5)
    assert "serviceAccountName" not in worker(one)


def test_a_spare_node_of_the_launchers_is_one_worker_pod_more_and_no_rank_more() -> None:
    """One word for both: pods beyond the job's nodes that the launcher did not know of would idle while it waited for a node."""
    rendered = render(job({"min_nodes": 3, "max_nodes": 4, "spare_nodes": 2}))
    one = ray_job(rendered)
    group = one["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (6, 6, 6)
    words = shlex.split(one["spec"]["entrypoint"])
    assert words[words.index("--nnodes") + 1] == "3:4" and words[words.index("--spare-nodes") + 1] == "2"
    assert "2 spare worker(s) of 6 wait idle with their GPUs" in rendered.notes
    growing = ray_job(render(job({"min_nodes": 3, "max_nodes": 4, "spare_nodes": 2}, autoscale=True)))
    group = growing["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (5, 5, 6)


def test_a_pod_lives_long_enough_after_sigterm_for_a_checkpoint() -> None:
    one = ray_job(render(job({"shutdown_timeout_s": 300.0})))
    assert worker(one)["terminationGracePeriodSeconds"] == 330


def test_an_older_kuberay_gets_no_token_and_rays_own_check_is_switched_off() -> None:
    """Ray 2.60 wants a token unless told otherwise, and KubeRay gives none before 1.5.1: no worker could join."""
    old = ray_job(render(job(kuberay="1.4.2")))
    assert "authOptions" not in old["spec"]["rayClusterSpec"]
    off = {"name": "RAY_AUTH_MODE", "value": "disabled"}
    assert off in worker(old)["containers"][0]["env"]
    assert off in old["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["env"]
    assert ray_job(render(job()))["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_a_schedule_makes_a_cron_job_whose_retries_submit_under_one_name() -> None:
    rendered = render(job(schedule="0 2 * * *", scheduler=Scheduler.KUEUE, queue="night"))
    assert rendered.main["kind"] == "CronJob"
    assert rendered.main["spec"]["concurrencyPolicy"] == "Forbid"
    container = rendered.main["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert "$(RUN_NAME)" in container["args"]
    carried = next(one for one in rendered.objects if one["metadata"]["name"] == "resnet-manifest")
    assert yaml.safe_load(carried["data"]["job.json"])["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"


def test_roce_counts_a_device_for_each_network() -> None:
    one = worker(ray_job(render(job(fabric="roce", fabric_networks=("rail-0", "rail-1")))))
    assert one["containers"][0]["resources"]["limits"]["nvidia.com/sriov-rdma-vf"] == "2"
    assert one["containers"][0]["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert one["securityContext"]["runAsUser"] == 0


Refusal = tuple[dict[str, Any], dict[str, Any], str]
REFUSED: dict[str, Refusal] = {
    "wrong quantity": ({}, {"memory": "512GB"}, "did you mean 512Gi"),
    "unit forgotten": ({}, {"memory": "512"}, "is the unit missing"),
    "name too long": ({}, {"name": "r" * 48}, "48 characters, at most 47"),
    "name with a dot": ({}, {"name": "res.net"}, "not ."),
    "name with a leading digit": ({}, {"name": "50-resnet"}, "must begin with a small letter"),
    "more ranks than CPUs": ({}, {"cpus": 4.0}, "Ray would wait for ever"),
    "more ranks than GPUs": ({}, {"gpus": 4}, "cannot be shared out evenly"),
    "shm over memory": ({}, {"shm": "400Gi"}, "counts against the memory limit"),
    "unknown fabric": ({}, {"fabric": "infinband"}, "no such fabric"),
    "fabric of unknown devices": ({}, {"fabric": "efa", "instance_type": "p9.large"}, "p9.large is not"),
    "fabric auto offline": ({}, {"fabric": "auto"}, "render never connects"),
    "fabric without GPUs": ({"nproc_per_node": 1}, {"fabric": "ib", "gpus": 0}, "RDMA between nodes serves GPUs"),
    "queue without a scheduler": ({}, {"queue": "research"}, "whose? No --scheduler"),
    "kueue and the autoscaler": (
        {},
        {"scheduler": Scheduler.KUEUE, "queue": "q", "autoscale": True},
        "takes autoscaling only as elastic slices",
    ),
    "kai with a submitter pod": ({}, {"scheduler": Scheduler.KAI, "queue": "q"}, "KAI refuses K8sJobMode"),
    "topology without kueue": (
        {},
        {"scheduler": Scheduler.VOLCANO, "queue": "q", "topology": "required=rack"},
        "is Kueue's",
    ),
    "a queue on a RayCronJob": (
        {},
        {
            "scheduler": Scheduler.KUEUE,
            "queue": "q",
            "schedule": "0 2 * * *",
            "schedule_with": ScheduleWith.RAY_CRON_JOB,
        },
        "gives its jobs no queue label",
    ),
    "a RayCronJob behind a closed gate": (
        {},
        {"schedule": "0 2 * * *", "schedule_with": ScheduleWith.RAY_CRON_JOB},
        "closed by default",
    ),
    "a time zone in the schedule": ({}, {"schedule": "TZ=UTC 0 2 * * *"}, "time zone inside"),
    "old KubeRay": (
        {},
        {"kuberay": "1.4.0", "start_deadline_s": 600},
        "needs KubeRay 1.6.0, and the cluster has 1.4.0",
    ),
    "SidecarMode on an old KubeRay": (
        {},
        {"kuberay": "1.4.0", "submission": Submission.SIDECAR},
        "submissionMode SidecarMode needs KubeRay 1.5.0",
    ),
    "a cache without its size": ({}, {"cache": CacheSettings(CacheMode.SIDECAR)}, "needs its size"),
    "a grace shorter than the ranks'": ({"shutdown_timeout_s": 100.0}, {"grace_s": 60.0}, "killed in the middle"),
    "a line break in an argument": (
        {"program": Program(ProgramKind.SCRIPT, "t.py", ("a\nb",))},
        {},
        "holds a line break",
    ),
    "a working dir that a shell would read": ({}, {"working_dir": "s3://b/$(id).zip"}, "pastes it into a shell line"),
    "a reserved variable": ({"env": {"RAY_ADDRESS": "x"}}, {}, "set by KubeRay itself"),
    "a file too large for a ConfigMap": ({}, {"files": {"a.py": "x" * 2**20}}, "a ConfigMap holds"),
    "a network policy over the host's network": (
        {},
        {"fabric": "oci", "network_policy": True},
        "are no pods to a policy",
    ),
    "an image that has no bash": ({}, {"image": "alpine:3.20"}, "has no bash by its name"),
    "the image's Ray is another": ({}, {"image": "rayproject/ray:2.49.0-py311"}, "--ray-version 2.49.0"),
}


@pytest.mark.parametrize(("spec_changes", "kube_changes", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_cluster_would_refuse_or_never_run_is_refused_here(
    spec_changes: dict[str, Any], kube_changes: dict[str, Any], said: str
) -> None:
    """Before anything is created, with what to do."""
    with pytest.raises(SpecError) as refusal:
        render(KubeJob(spec(**spec_changes), kube(**kube_changes)))
    assert said in str(refusal.value)


def test_a_volcano_job_carries_its_labels_on_the_rayjob_and_none_on_pods() -> None:
    one = ray_job(render(job(scheduler=Scheduler.VOLCANO, queue="gpu", priority_class="high")))
    assert (
        one["metadata"]["labels"] | {"volcano.sh/queue-name": "gpu", "ray.io/priority-class-name": "high"}
        == one["metadata"]["labels"]
    )
    assert "volcano" not in str(worker(one))


def test_kueues_topology_request_is_on_the_workers_pods() -> None:
    group = ray_job(render(job(scheduler=Scheduler.KUEUE, queue="gpu", topology="required=rack")))["spec"][
        "rayClusterSpec"
    ]["workerGroupSpecs"][0]
    assert group["template"]["metadata"]["annotations"] == {"kueue.x-k8s.io/podset-required-topology": "rack"}


def test_the_needed_release_is_that_of_the_newest_field() -> None:
    assert render(job(kuberay="1.4.0")).needs_kuberay == "1.2.0"
    assert render(replace(job(), kube=kube(start_deadline_s=600))).needs_kuberay == "1.6.0"
