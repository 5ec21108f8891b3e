"""`python -m launcher doctor`: looks at this machine, at the nodes of a Ray cluster, or at recorded facts, and says what it sees.

A thin shell: it reads facts, asks the rules and the checks, prints a page. How the nodes of a Ray cluster are reached is
given by the caller (`connect`), because this room does not know Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

from launcher.fabric.conduct import Peer, Wishes, conduct
from launcher.fabric.decision import UserEnv
from launcher.fabric.facts import FactsError, NodeFacts
from launcher.fabric.findings import Finding, Severity, findings, share_a_machine, worst
from launcher.fabric.interfaces import choose_interface
from launcher.fabric.order import order_nodes, place_of
from launcher.fabric.page import Examination, as_json, explain_page, text_page
from launcher.fabric.peer import LocalPeer
from launcher.fabric.probe import probe
from launcher.fabric.recorded import load, names_of, save
from launcher.fabric.rules import GangRequest, NodeEnvironment, environment
from launcher.fabric.verdict import summary

EXIT_USAGE = 64
"""sysexits.h EX_USAGE: the command line is wrong. 0, 1 and 2 are taken by the severity of what was found."""

EXIT_NO_FACTS = 66
"""sysexits.h EX_NOINPUT: there was nothing to look at."""

EPILOG = """\
exit code: 0 nothing worse than a remark, 1 warnings, 2 errors, 64 wrong usage, 66 no facts to look at

examples:
  python -m launcher doctor                          this machine
  python -m launcher doctor --explain NCCL_IB_HCA    why one variable is what it is
  python -m launcher doctor --save facts/            record this machine; copy the files of all nodes into one folder, then
  python -m launcher doctor --facts facts/           look at them together
"""


class Nodes(Protocol):
    """The nodes of a cluster, however they are reached."""

    def look(self) -> tuple[Sequence[NodeFacts], Sequence[Finding]]:
        """The facts of all that gave some, and a finding for each that did not."""
        ...

    def peers(self) -> Sequence[Peer]:
        """Who measures from each node of `look`, in that order."""
        ...

    def close(self) -> None: ...


Connect = Callable[[str], Nodes]
"""From the address of a cluster to its nodes."""


def main(
    argv: Sequence[str],
    *,
    connect: Connect | None = None,
    env: Mapping[str, str] | None = None,
    root: str | Path = "/",
) -> int:
    """Runs the doctor; the result is the exit code.

    `connect` is what `--address` uses; `env` defaults to this process's.
    """
    user_env = os.environ if env is None else env
    options = _parser(connect is not None).parse_args(list(argv))
    cluster: Nodes | None = None
    try:
        if options.address is not None:
            assert connect is not None
            cluster = connect(options.address)
        nodes, extra, remark = _look(options, cluster, root)
        if options.save is not None:
            return _save(nodes, Path(options.save))
        request = _request(options, len(nodes))
        if options.probe:
            measured, said = _measure(options, nodes, cluster, environment(nodes, request, user_env))
            extra, remark = (*extra, *measured), f"{remark} {said}"
    except FactsError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return EXIT_NO_FACTS
    finally:
        if cluster is not None:
            cluster.close()
    examination = examine(nodes, request, user_env, extra=extra, remark=remark)
    if options.explain is not None:
        print(explain_page(examination, options.explain), end="")
        return 0
    if options.json:
        print(json.dumps(as_json(examination), indent=1))
    else:
        print(text_page(examination), end="")
    return int(worst(examination.findings))


def examine(
    nodes: Sequence[NodeFacts],
    request: GangRequest,
    user_env: UserEnv,
    *,
    extra: Sequence[Finding] = (),
    remark: str = "",
) -> Examination:
    """All that follows from the facts of these nodes; `extra` findings come first."""
    order = order_nodes([place_of(facts) for facts in nodes])
    found = [*extra, *findings(nodes, request=request, user_env=user_env)]
    return Examination(
        tuple(nodes),
        environment(nodes, request, user_env),
        order,
        tuple(sorted(found, key=lambda finding: -finding.severity)),
        remark,
    )


def _look(
    options: argparse.Namespace, cluster: Nodes | None, root: str | Path
) -> tuple[tuple[NodeFacts, ...], tuple[Finding, ...], str]:
    if options.facts is not None:
        recorded = load(Path(options.facts))
        return (
            recorded.nodes,
            recorded.findings,
            f"Recorded facts from {options.facts}; your variables are this shell's.",
        )
    if cluster is not None:
        nodes, silent = cluster.look()
        if not nodes:
            why = f"\n{silent[0].evidence}" if silent else ""
            raise FactsError(
                f"no node of the Ray cluster at {options.address} says anything of itself.{why}\nCheck it with: ray status"
            )
        return (
            tuple(nodes),
            tuple(silent),
            f"The nodes of the Ray cluster at {options.address}; your variables are this shell's.",
        )
    alone = "This machine, as a node of a larger gang." if options.nnodes is None else "This machine."
    return (probe(root, node_ip=options.node_ip),), (), alone


def _measure(
    options: argparse.Namespace,
    nodes: Sequence[NodeFacts],
    cluster: Nodes | None,
    environments: Sequence[NodeEnvironment],
) -> tuple[tuple[Finding, ...], str]:
    """What `--probe` finds, and a sentence about it."""
    if options.facts is not None:
        return (), "Nothing was measured: --probe needs the nodes themselves."
    if cluster is None:
        return _measure_here(nodes[0])
    is_one_machine = share_a_machine(nodes)
    wishes = Wishes(
        # Nodes that share processors and a name would only measure each other.
        compute=not is_one_machine,
        names=not is_one_machine,
        reduce=True,
        environments=[node.variables() for node in environments],
        transports=[node.hcas.transport for node in environments],
    )
    report = conduct(cluster.peers(), names_of(nodes), wishes)
    return report.findings, summary(report)


def _measure_here(facts: NodeFacts) -> tuple[tuple[Finding, ...], str]:
    """On one machine: does its own address accept connections on ephemeral ports, and how fast is its processor."""
    address = choose_interface(facts).address or "127.0.0.1"
    try:
        peer = LocalPeer(address)
    except OSError as error:
        finding = Finding(
            "unreachable",
            Severity.ERROR,
            (facts.hostname,),
            f"nothing can listen on {address} ({error})",
            "ranks on this node cannot be connected to",
            "check that the address is this machine's: ip addr",
        )
        return (finding,), f"Probed {address}."
    try:
        (outcome,) = peer.connect([peer.endpoint()])
        seconds = peer.compute()
        report = conduct([peer], [facts.hostname], Wishes(reduce=True)) if facts.gpus else None
    finally:
        peer.close()
    found = report.findings if report is not None else ()
    speeds = ", ".join(f"{what} {value * 1000:.1f} ms" for what, value in seconds.items())
    said = f"Probed {address}: {speeds}." + (f" {summary(report)}" if report is not None else "")
    if outcome.is_ok:
        return found, f"{said} Its ephemeral ports accept connections."
    finding = Finding(
        "unreachable",
        Severity.ERROR,
        (facts.hostname,),
        f"the machine cannot connect to itself at {address} ({outcome.problem})",
        "ranks on this node cannot be connected to",
        "let the firewall pass the ports of net.ipv4.ip_local_port_range",
    )
    return (finding, *found), said


def _save(nodes: Sequence[NodeFacts], folder: Path) -> int:
    try:
        for path in save(nodes, folder):
            print(path)
    except OSError as error:
        print(f"doctor: the facts could not be written to {folder} ({error}).", file=sys.stderr)
        return EXIT_NO_FACTS
    return 0


def _request(options: argparse.Namespace, num_facts: int) -> GangRequest:
    return GangRequest(
        local_world_size=options.nproc_per_node,
        # One machine is shown as it would be in a larger gang: alone it needs almost nothing set.
        num_nodes=options.nnodes if options.nnodes is not None else max(2, num_facts),
        bind=options.bind,
        is_rail_only=True if options.rail_only else None,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse would exit with 2, which here means "errors were found".
        self.print_usage(sys.stderr)
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _parser(can_gather: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m launcher doctor",
        description="What this machine's GPUs and network are, what would be set for a job and why, and what is wrong.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--facts", metavar="DIR", help="look at recorded facts: a folder of *.json, or one file")
    if can_gather:
        where.add_argument("--address", help="look at every node of the Ray cluster at this address")
    parser.add_argument("--save", metavar="DIR", help="write the facts of each node to DIR/HOST.json and stop")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a page")
    parser.add_argument("--explain", metavar="VARIABLE", help="say why one variable is set or left, and stop")
    parser.add_argument(
        "--probe", action="store_true", help="also measure: connections, processor; on a cluster every pair"
    )
    parser.add_argument("--node-ip", help="the address by which the other nodes reach this machine")
    parser.add_argument("--nnodes", type=_positive, help="nodes of the job (default: the nodes seen, at least 2)")
    parser.add_argument("--nproc-per-node", type=_positive, help="ranks per node (default: one per GPU)")
    parser.add_argument("--bind", choices=("auto", "numa", "none"), default="auto", help="bind ranks to CPUs")
    parser.add_argument("--rail-only", action="store_true", help="NICs of different number cannot reach each other")
    parser.set_defaults(address=None)
    return parser
