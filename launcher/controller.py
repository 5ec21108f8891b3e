"""The thin loop: events in, `gang.machine.step`, actions out, everything journalled. It holds no judgement."""

from __future__ import annotations

from launcher.cluster.ports import Cluster
from launcher.spec import JobSpec


def run(spec: JobSpec, cluster: Cluster) -> int:
    """Runs the job to its end and returns the exit code of the command. Called once, from the main thread (it handles signals).

    Makes the run directory, prints its path, opens the cluster, closes it whatever happens. Raises LauncherError (with its
    `exit_code`) when nothing could be started; the caller prints it.
    """
    raise NotImplementedError
