"""`python -m launcher …`: reads argv, the environment and the disk, and runs what is meant. The only place that prints mistakes.

Imports stay inside functions where they cost: `--help` and a misspelt flag must answer at once, and Ray is imported only for a cluster.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import EXIT_INTERNAL, EXIT_OK, EXIT_SIGNAL_BASE, LauncherError, NodeError, SpecError
from launcher.spec import Program, ProgramKind

if TYPE_CHECKING:
    from launcher.cluster.ports import Cluster
    from launcher.cluster.preflighted import Measurable
    from launcher.exclusion_file import ExclusionFile
    from launcher.fabric.doctor import Nodes
    from launcher.options.intent import Intent
    from launcher.spec import JobSpec


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. `argv` without the program's name; None: the process's own."""
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except LauncherError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `--help | head`: whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGNAL_BASE + signal.SIGPIPE
    except KeyboardInterrupt:  # before the controller takes the signals, for example while a cluster is looked for
        print("launcher: interrupted before anything was started", file=sys.stderr)
        return EXIT_SIGNAL_BASE + signal.SIGINT
    except Exception:
        import traceback

        print(f"launcher: a fault in the launcher; please report it\n{traceback.format_exc()}", end="", file=sys.stderr)
        return EXIT_INTERNAL


KUBERNETES_COMMANDS = ("render", "submit", "status", "logs", "stop", "list")
"""First words that mean Kubernetes; a script of such a name is run as ./render. `status` is about runs of this launcher, too."""
RUN_COMMANDS = ("status", "report")
"""First words that ask about a run."""


def _run(argv: list[str]) -> int:
    if argv and argv[0] in RUN_COMMANDS:
        from launcher.report import commands

        if argv[0] == "report":
            return commands.report(argv[1:])
        if not commands.means_kubernetes(argv[1:]):
            return commands.status(argv[1:])
    if argv and argv[0] in KUBERNETES_COMMANDS:
        from launcher.k8s.commands import COMMANDS

        return COMMANDS[argv[0]](argv[1:])
    if argv and argv[0] == "doctor":
        from launcher.fabric.doctor import main as doctor

        return doctor(argv[1:], connect=_nodes_of_cluster)
    from launcher.options.intent import understand
    from launcher.options.parse import parse

    line = parse(argv, os.environ)
    if line.wants_help:
        from launcher.options.helptext import help_text

        print(help_text(shutil.get_terminal_size().columns), flush=True)
        return EXIT_OK
    if line.wants_version:
        from importlib.metadata import version

        print(f"railhead {version('railhead')}")
        return EXIT_OK
    intent = understand(line, os.environ, os.getcwd(), os.urandom(8).hex())
    check_program(intent.spec.program)
    return run(intent)


def run(intent: Intent, on_run_dir: Callable[[str], None] | None = None) -> int:
    """Runs what is meant, to its end. on_run_dir is told the run directory as soon as there is one."""
    for note in intent.notes:
        print(f"launcher: {note}", file=sys.stderr)
    from launcher import controller
    from launcher.exclusion_file import NOWHERE, ExclusionFile, default_path

    # On one machine there is nobody to leave out, so nothing to remember.
    remembered = NOWHERE if intent.address is None else intent.spec.exclude_file or default_path(os.environ)
    exclusions = ExclusionFile(remembered)
    spec, cluster = _place(intent, exclusions)
    measured = _measured_first(cluster, exclusions) if spec.preflight else cluster
    return controller.run(spec, measured, exclusions, on_run_dir)


def _measured_first(cluster: Measurable, exclusions: ExclusionFile) -> Cluster:
    from launcher.cluster.preflighted import Preflighted

    return Preflighted(cluster, exclusions)


def _nodes_of_cluster(address: str) -> Nodes:
    from launcher.cluster.ray.probes import ClusterDoctor

    return ClusterDoctor(address)


def _place(intent: Intent, exclusions: ExclusionFile) -> tuple[JobSpec, Measurable]:
    """The cluster, and the job with its number of ranks per node, which the machine or the cluster knows."""
    if intent.address is None:
        from launcher.cluster.local import LocalCluster

        spec = intent.spec
        if intent.procs_wish is not None:
            spec = replace(spec, nproc_per_node=procs_of_this_machine(intent.procs_wish))
        if spec.local_addr or spec.master_port:
            check_store_address(spec.local_addr or "127.0.0.1", spec.master_port)
        return spec, LocalCluster()
    from launcher.cluster.ray import connect

    cluster = connect(intent.address, intent.spec, exclusions)
    try:
        return cluster.fill_in(intent.spec, intent.procs_wish), cluster
    except BaseException:
        cluster.close()
        raise


def check_store_address(host: str, port: int | None) -> None:
    """Raises SpecError for an address that is not ours or a port that is taken: a mistake in the command, not a lost node."""
    from launcher.node import store

    try:
        listener, _ = store.bind(host, port)
    except NodeError as error:
        raise SpecError(error.message, advice=error.advice) from error
    listener.close()


def procs_of_this_machine(wish: str) -> int:
    """`gpu`, `cpu` or `auto` as torchrun works it out, without importing torch."""
    from launcher.options.devices import count_cpus, count_gpus

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    num_gpus = count_gpus(visible) if wish in ("gpu", "auto") else 0
    if num_gpus:
        return num_gpus
    if wish == "gpu":
        hidden = f" that CUDA_VISIBLE_DEVICES={visible} shows" if visible is not None else ""
        raise SpecError(
            f"--nproc-per-node gpu: this machine has no NVIDIA GPU{hidden}",
            advice="nvidia-smi shows what the driver sees; to train on CPUs write --nproc-per-node cpu or a number",
        )
    return count_cpus()


def check_program(program: Program) -> None:
    """Raises SpecError at once for what every rank would fail on a moment later, each with a traceback of its own."""
    if program.kind is ProgramKind.SCRIPT:
        _check_script(Path(program.target))
    elif program.kind is ProgramKind.MODULE and not program.python:
        _check_module(program.target)
    elif program.kind is ProgramKind.EXECUTABLE and shutil.which(program.target) is None:
        raise SpecError(
            f"--no-python {program.target}: no such program on PATH, or it may not be executed",
            advice="for a program in this directory write ./NAME, and chmod +x NAME",
        )


def _check_script(script: Path) -> None:
    if not script.exists():
        near = _near_name(script)
        hint = f"did you mean {near}?" if near else "paths are taken from the directory in which the command runs"
        raise SpecError(f"no such script: {script} (in {os.getcwd()})", advice=hint)
    if script.is_dir() and not (script / "__main__.py").is_file():
        raise SpecError(f"{script} is a directory without __main__.py", advice="name the script in it")
    if not os.access(script, os.R_OK):
        raise SpecError(f"{script} may not be read by uid {os.getuid()}", advice=f"chmod +r {script}")


def _near_name(script: Path) -> str | None:
    """A script beside it whose name is nearly this one."""
    import difflib

    if not script.parent.is_dir():
        return None
    names = [path.name for path in script.parent.glob("*.py")]
    close = difflib.get_close_matches(script.name, names, n=1, cutoff=0.6)
    return str(script.parent / close[0]) if close else None


def _check_module(name: str) -> None:
    """Looks for the outermost package only: to look further would run its code here."""
    import importlib.machinery

    top = name.partition(".")[0]
    if not top.isidentifier():
        raise SpecError(f"-m {name}: not the name of a module", advice="write it with dots, without .py")
    # `python -m` puts the working directory first
    if importlib.machinery.PathFinder.find_spec(top, [os.getcwd(), *sys.path]) is None:
        raise SpecError(
            f"-m {name}: there is no module {top} here or among the installed packages", advice="is the name right?"
        )
