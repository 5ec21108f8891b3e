"""The same job on Kubernetes: a JobSpec and what only Kubernetes knows become manifests, which KubeRay runs.

Pure: `options` (what can be asked for), `manifest` with `pods`, `cachepod`, `fabric`, `queues`, `extras` (job → objects), `rules*` and
`releases` (objects → what the cluster would refuse, or worse, would not refuse), `phases` (objects that the cluster reports → one line).
Shell: `flags` and `jobfile` (texts → options), `client` (the Kubernetes client is imported only there), `follow`, `commands`.
"""

from __future__ import annotations
