"""What a rule says, and the operator it says it of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """A manifest breaks a rule of KubeRay's or Kubernetes' that no schema shows."""

    rule: str
    """Short name, for tests and for looking it up in docs/kubernetes-rules.md."""
    message: str
    advice: str = ""
    is_fatal: bool = True
    """False: it runs, and not as one may think; said, not refused."""


@dataclass(frozen=True)
class Operator:
    """The KubeRay that will read the manifest."""

    release: str | None = None
    """None: not known; it is then taken to be new enough."""
    gates: frozenset[str] = frozenset()
    """Feature gates opened beyond the defaults."""


RAY_PORTS = {
    6379: "Ray's GCS",
    8265: "Ray's dashboard",
    10001: "Ray's client server",
    8000: "Ray Serve",
    8080: "Ray's metrics",
    52365: "Ray's dashboard agent",
    44217: "the autoscaler's metrics",
    44227: "the dashboard's metrics",
}
