"""`--help` of the Kubernetes commands, made from the table of flags."""

from __future__ import annotations

import textwrap

from launcher.k8s.flags import FLAGS, GROUPS

_COMMANDS = {
    "render": "Prints the manifests that run this job on a cluster with KubeRay; connects to nothing.",
    "submit": "Submits the job to a cluster with KubeRay, says what it waits for, shows rank 0's output, ends with the job's code.",
}
_OWN = {
    "render": (("--output FILE", "Write there instead of standard output."),),
    "submit": (
        ("--dry-run", "Ask the cluster what it would say; create nothing."),
        ("--detach", "Come back as soon as the job is there."),
        ("--wait-placed", "Come back as soon as all pods run."),
        ("--json", "One JSON object per line instead of sentences."),
        ("--context NAME", "Context of the kubeconfig. [its current one; in a pod, its own account]"),
        ("--manifest FILE", "Submit this RayJob (JSON or YAML) instead of one made from flags."),
    ),
}
_WIDTH, _INDENT = 118, 38


def help_text(command: str) -> str:
    head = f"""\
usage: python -m launcher {command} [flags] TARGET [arguments of TARGET …]
       python -m launcher {command} --file job.yaml [flags]

{_COMMANDS[command]} All flags of the launcher itself are taken as well
(python -m launcher --help): --nnodes, --nproc-per-node, --spare-nodes, …

  python -m launcher {command} --image registry/train:1.4 --nnodes 16 --nproc-per-node 8 --gpus 8 train.py --lr 0.1
"""
    parts = [head, "This command:\n" + "".join(_row(flag, text) for flag, text in _OWN[command])]
    for group in GROUPS:
        rows = [_row(f"--{flag.name} {flag.metavar}".rstrip(), flag.help) for flag in FLAGS if flag.group == group]
        parts.append(f"{group}:\n" + "".join(rows))
    return "\n".join(parts).rstrip()


def _row(flag: str, text: str) -> str:
    lines = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False) or [""]
    first = f"  {flag}"
    if len(first) < _INDENT - 1:
        lines[0] = first.ljust(_INDENT) + lines[0]
        return "\n".join([lines[0], *(" " * _INDENT + line for line in lines[1:])]).rstrip() + "\n"
    return "\n".join([first, *(" " * _INDENT + line for line in lines if line)]) + "\n"


_LOOKUPS = {
    "status": (
        "NAME",
        "Says where a job stands. (Of a run on this machine or on Ray: python -m launcher status --help.)",
    ),
    "logs": (
        "NAME",
        "Follows a job: what it waits for, rank 0's output, and its exit code. Ctrl-C leaves the job alone.",
    ),
    "stop": (
        "NAME",
        "Deletes a job and all that belongs to it. Its ranks get SIGTERM, and --shutdown-timeout for a checkpoint.",
    ),
    "list": ("", "One line for each job of the namespace."),
}


def lookup_help(command: str) -> str:
    name, text = _LOOKUPS[command]
    usage = " ".join(word for word in ("usage: python -m launcher", command, name, "[flags]") if word)
    rows = (
        ("--namespace NAME, -n NAME", "[that of the context]"),
        ("--context NAME", "Context of the kubeconfig. [its current one]"),
        ("--json", "For programs."),
    )
    return f"{usage}\n\n{text}\n\n" + "".join(_row(flag, help_) for flag, help_ in rows).rstrip()
