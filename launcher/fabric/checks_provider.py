"""Checks of what a cloud provider's network needs beside NCCL: its plugin, its devices, its settings."""

from __future__ import annotations

from launcher.fabric.cloud import instance_type
from launcher.fabric.findings import Finding, NodeCheck, Severity, View
from launcher.fabric.hcas import is_efa

EFA_DEVICES = {
    "p4d.24xlarge": 4,
    "p4de.24xlarge": 4,
    "p5.48xlarge": 32,
    "p5e.48xlarge": 32,
    "p5.4xlarge": 1,
    "p5en.48xlarge": 16,
    "p6-b200.48xlarge": 8,
}
"""EFA devices of an instance type, from AWS's tables."""


def provider_plugin(view: View) -> list[Finding]:
    provider = view.env.provider
    if provider is None or provider.needs_plugin is None or not view.is_multi_node:
        return []
    return [
        view.finding(
            "provider-plugin-missing",
            Severity.ERROR,
            f"{provider.title} ({provider.evidence}): {provider.needs_plugin}",
            "the provider's fast network stays unused",
            f"mount what {provider.source} name",
        )
    ]


def efa(view: View) -> list[Finding]:
    facts = view.facts
    devices = [hca for hca in facts.hcas if is_efa(facts, hca)]
    kind = instance_type(facts) or ""
    wanted = EFA_DEVICES.get(kind)
    found = []
    if wanted is not None and len(devices) < wanted and view.is_multi_node:
        found.append(
            view.finding(
                "efa-missing",
                Severity.ERROR,
                f"{len(devices)} EFA devices here; {kind} has {wanted}",
                "bandwidth between nodes is a fraction of what was bought",
                f"request vpc.amazonaws.com/efa: {wanted} for the pod, and check the instance's network interfaces",
            )
        )
    if devices and facts.memory.huge_pages_free == 0:
        found.append(
            view.finding(
                "efa-huge-pages",
                Severity.WARNING,
                "no free huge pages",
                "libfabric's EFA provider wants 2 MiB pages; without, a fork in the training process can fail with ENOMEM",
                "give the pod hugepages-2Mi: 5120Mi, or set FI_EFA_USE_HUGE_PAGE=0",
            )
        )
    if devices and "RDMAV_FORK_SAFE" in view.user_env:
        found.append(
            view.finding(
                "efa-fork-safe",
                Severity.WARNING,
                f"RDMAV_FORK_SAFE={view.user_env['RDMAV_FORK_SAFE']}",
                "with EFA this variable makes memory registration fail or crawl",
                "unset RDMAV_FORK_SAFE",
            )
        )
    return found


CHECKS: tuple[NodeCheck, ...] = (provider_plugin, efa)
