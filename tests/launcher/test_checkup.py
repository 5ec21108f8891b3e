"""What the nodes saw, together: kept, shown, and said once where something is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.checkup import Checkup
from launcher.fabric.codec import to_json
from launcher.fabric.doctor import main as doctor
from launcher.fabric.facts import NodeFacts
from launcher.gang.events import Event, FabricFound, FabricSurveyed, Notice
from launcher.gang.world import NodeInfo, World
from launcher.journal import to_json as to_journal
from launcher.messages import notice
from launcher.spec import JobSpec, Program, ProgramKind
from tests.launcher.fabric.machines import healthy_facts
from tests.launcher.launched import launch

SPEC = JobSpec(Program(ProgramKind.SCRIPT, "train.py"), 3, 3)


class Round:
    """A checkup over three equal machines, and what it said."""

    def __init__(self, facts: NodeFacts, directory: Path) -> None:
        self.said: list[Event] = []
        self.directory = directory
        self.checkup = Checkup(SPEC, str(directory), self.said.append)
        self.facts = [
            replace(
                facts,
                hostname=f"host{idx}",
                node_ip=f"10.20.30.{idx + 10}",
                gpus=tuple(replace(gpu, uuid=f"GPU-{idx}-{gpu.index}") for gpu in facts.gpus),
                netdevs=tuple(
                    replace(netdev, addresses=(f"10.20.30.{idx + 10}/24",)) if netdev.addresses else netdev
                    for netdev in facts.netdevs
                ),
            )
            for idx in range(3)
        ]

    def world(self) -> World:
        return World(tuple(NodeInfo(f"n{idx}", f"host{idx}", f"10.20.30.{idx + 10}", 8) for idx in range(3)))

    def survey(self, idx: int, *user_env: tuple[str, str]) -> None:
        self.checkup.surveyed(FabricSurveyed(f"n{idx}", to_json(self.facts[idx]), user_env))

    def found(self) -> list[str]:
        return [event.id for event in self.said if isinstance(event, FabricFound)]


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    return Round(healthy_facts("dgx-a100", tmp_path / "dgx"), tmp_path / "run")


def test_healthy_nodes_are_kept_and_nothing_is_said(round_: Round, capsys: pytest.CaptureFixture[str]) -> None:
    """A start that always warns is a start that nobody reads. The facts can be looked at again later, by the doctor."""
    round_.checkup.started(round_.world())
    for idx in range(3):
        round_.survey(idx)
    round_.checkup.close()
    assert round_.said == []
    folder = round_.directory / "fabric"
    assert sorted(path.name for path in folder.iterdir()) == ["host0.json", "host1.json", "host2.json", "page.txt"]
    assert "3 nodes, 24 GPUs" in (folder / "page.txt").read_text()
    assert doctor(["--facts", str(folder)], env={}) == 0
    assert "host2" in capsys.readouterr().out


def test_what_is_wrong_is_said_once_in_a_line_with_its_cure_the_worst_first(round_: Round) -> None:
    """One node with a dead link and little shared memory, and a variable of the user's that fits no card."""
    broken = round_.facts[1]
    hcas = tuple(
        replace(hca, ports=(replace(hca.ports[0], state="DOWN"),)) if hca.name == "mlx5_2" else hca
        for hca in broken.hcas
    )
    gpus = tuple(replace(gpu, num_ecc_uncorrected=2) for gpu in broken.gpus)
    round_.facts[1] = replace(broken, hcas=hcas, gpus=gpus)
    for idx in range(3):
        round_.survey(idx, ("NCCL_SOCKET_IFNAME", "ens9"))
    round_.checkup.started(round_.world())
    round_.checkup.started(round_.world())
    round_.checkup.close()
    events = [event for event in round_.said if isinstance(event, FabricFound)]
    assert {"port-down", "interface-user-missing", "gpu-ecc"} <= set(round_.found())
    assert [event.severity for event in events] == sorted(event.severity for event in events)
    assert len(set(events)) == len(events)
    line = notice(next(event for event in events if event.id == "port-down"), None)
    assert "\n" not in line
    assert line.startswith("fabric: ")
    assert "port-down on host1: " in line
    assert "To do: " in line
    assert "hca-missing" in round_.found() or "rate-mismatch" in round_.found() or len(events) >= 3


def test_a_node_that_joins_later_is_looked_at_with_the_others(round_: Round) -> None:
    round_.checkup.started(World(round_.world().nodes[:2]))
    round_.survey(0)
    round_.survey(1)
    mtu = tuple(replace(netdev, mtu=9000) for netdev in round_.facts[2].netdevs)
    round_.facts[2] = replace(round_.facts[2], netdevs=mtu)
    round_.checkup.started(round_.world())
    round_.survey(2)
    round_.checkup.close()
    assert "mtu-mismatch" in round_.found()


def test_a_node_without_facts_is_told_and_the_others_are_looked_at(round_: Round) -> None:
    round_.survey(0)
    round_.survey(1)
    round_.checkup.surveyed(FabricSurveyed("n2", "", problem="RuntimeError: on fire"))
    round_.checkup.started(round_.world())
    round_.checkup.close()
    (told,) = [event for event in round_.said if isinstance(event, Notice)]
    assert "on fire" in told.text
    assert (round_.directory / "fabric" / "host1.json").exists()


@pytest.mark.parametrize("facts", ["{", '{"format": "railhead-fabric-facts", "version": 9, "facts": {}}'])
def test_facts_that_cannot_be_read_cost_that_node_and_never_the_job(round_: Round, facts: str) -> None:
    round_.survey(0)
    round_.survey(1)
    round_.checkup.surveyed(FabricSurveyed("n2", facts))
    round_.checkup.started(round_.world())
    round_.checkup.close()
    (told,) = [event for event in round_.said if isinstance(event, Notice)]
    assert "could not be looked at" in told.text
    assert (round_.directory / "fabric" / "host1.json").exists()


def test_a_run_directory_that_cannot_be_written_is_said(round_: Round) -> None:
    round_.directory.write_text("a file in its place")
    for idx in range(3):
        round_.survey(idx)
    round_.checkup.started(round_.world())
    round_.checkup.close()
    (told,) = [event for event in round_.said if isinstance(event, Notice)]
    assert "could not be written" in told.text


def test_facts_are_not_written_into_the_journal_again(round_: Round) -> None:
    """They lie beside it; a thousand nodes would make it unreadable."""
    line = to_journal(FabricSurveyed("n0", to_json(round_.facts[0]), (("NCCL_DEBUG", "INFO"),), 0.04))
    assert line == {"node_id": "n0", "took_s": 0.04, "problem": ""}


def test_several_nodes_on_one_machine_are_a_trial_not_an_error(round_: Round) -> None:
    """Raylets on a laptop share its address and its GPUs; nobody wants to hear that at each start."""
    same = replace(round_.facts[0], node_ip="127.0.0.1", platform=replace(round_.facts[0].platform, boot_id="b"))
    round_.facts = [same] * 3
    for idx in range(3):
        round_.survey(idx)
    round_.checkup.started(round_.world())
    round_.checkup.close()
    assert round_.said == []


@pytest.mark.e2e
def test_a_start_on_this_machine_keeps_its_facts_and_says_nothing(tmp_path: Path) -> None:
    """As a user sees it, on a machine without GPUs: no line more than before, and gloo's interface is left alone."""
    script = "import os, time; print(os.environ.get('GLOO_SOCKET_IFNAME')); time.sleep(0.5)"
    with launch(tmp_path, script, "--nproc-per-node=2", env={"GLOO_SOCKET_IFNAME": ""}) as launched:
        code, out, err = launched.finish()
        assert code == 0, err
        assert "fabric" not in err
        (surveyed,) = launched.journal("FabricSurveyed")
        assert surveyed.fields["problem"] == ""
        page = (launched.run_dir / "fabric" / "page.txt").read_text()
        assert "GLOO_SOCKET_IFNAME" in page
        account = json.loads((launched.run_dir / "attempt_0/rank_0/environment.json").read_text())
        assert not [item for item in account["set"] if item["name"].startswith(("NCCL_", "GLOO_"))]
        assert out == "[rank0] \n"
