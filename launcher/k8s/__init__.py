"""The same job on Kubernetes: a JobSpec and what only Kubernetes knows become manifests, which KubeRay runs.

Pure, importing `launcher.spec` and `launcher.errors` only:
    options       KubeJob: the JobSpec, and what the cluster must know besides
    quantity, names, releases     Kubernetes' numbers and names; KubeRay's fields by release
    entrypoint    JobSpec → the command line that makes it again
    wiring, fabric, fabric_gke, queues, cachepod, peers, pods, extras, schedule, manifest     KubeJob → objects
    rules, rules_cluster, rules_pod, violation     objects → what the cluster would refuse, or take and never run
    admission, refusals, phases, logcursor     what the cluster answers → sentences, phases, new lines
    jobfile, values     texts → entries and values
Shell:
    flags, request     flags and job files → KubeJob (the launcher's own flags are read by `launcher.options`)
    upload        a folder of code → a zip in an object store
    client        the API server; the Kubernetes client is imported only here
    submission, follow, commands, helptext     what a person runs
    leave         what a pod does before it goes (its preStop hook)
"""

from __future__ import annotations
