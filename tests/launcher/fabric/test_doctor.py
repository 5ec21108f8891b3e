"""`doctor` as a user runs it: the page, JSON, recorded facts, one variable explained, and an exit code that is true."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.fabric.codec import to_json
from launcher.fabric.doctor import EXIT_NO_FACTS, EXIT_USAGE, main
from launcher.fabric.facts import NodeFacts
from launcher.fabric.findings import Finding, Severity
from tests.fakes.peers import FakePeer, gang

Recorded = Callable[[str], NodeFacts]


def _save(folder: Path, *nodes: NodeFacts) -> str:
    folder.mkdir(exist_ok=True)
    for facts in nodes:
        (folder / f"{facts.hostname}.json").write_text(to_json(facts))
    return str(folder)


def test_page_shows_nodes_matrix_environment_and_findings(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--facts", _save(tmp_path, recorded("dgx-a100"))], env={}) == 0
    page = capsys.readouterr().out
    for part in ("1 node, 8 GPUs", "infiniband", "GPU7", "PXB", "NCCL_IB_HCA = =mlx5_0,", "Findings: none"):
        assert part in page
    assert max(len(line) for line in page.splitlines()) < 140


def test_alike_nodes_are_shown_once(recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixty-four equal nodes must not be sixty-four pages."""
    nodes = [
        replace(
            recorded("dgx-a100"),
            hostname=f"node{idx:02}",
            node_ip=f"10.20.30.{idx + 1}",
            netdevs=tuple(
                replace(netdev, addresses=(f"10.20.30.{idx + 1}/24",)) if netdev.addresses else netdev
                for netdev in recorded("dgx-a100").netdevs
            ),
        )
        for idx in range(64)
    ]
    assert main(["--facts", _save(tmp_path, *nodes)], env={}) == 0
    page = capsys.readouterr().out
    assert page.count("GPUS AND NICS") == 1
    assert "and 59 more" in page


def test_exit_code_follows_the_worst_finding(recorded: Recorded, tmp_path: Path) -> None:
    facts = recorded("dgx-a100")
    slow = tuple(replace(gpu, num_ecc_uncorrected=1) for gpu in facts.gpus)
    sick = tuple(replace(gpu, recovery_action="node-reboot") for gpu in facts.gpus)
    for number, (gpus, code) in enumerate([(facts.gpus, 0), (slow, 1), (sick, 2)]):
        folder = _save(tmp_path / str(number), replace(facts, gpus=gpus))
        assert main(["--facts", folder], env={}) == code
        assert main(["--facts", folder, "--json"], env={}) == code


def test_json_says_what_the_page_says(recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--facts", _save(tmp_path, recorded("oci-bm-gpu-h100-8")), "--json"], env={"NCCL_IB_TC": "7"})
    document = json.loads(capsys.readouterr().out)
    (node,) = document["nodes"]
    assert node["transport"] == "roce"
    assert node["affinity"]["GPU0"]["mlx5_0"] == "PXB"
    assert node["environment"]["NCCL_IB_TC"] | {"reason": "", "source": ""} == {
        "value": "41",
        "user_value": "7",
        "effective": "7",
        "reason": "",
        "source": "",
    }
    assert document["findings"] == []


def test_one_variable_is_explained(recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _save(tmp_path, recorded("dgx-a100"))
    assert main(["--facts", folder, "--explain", "NCCL_IB_HCA"], env={"NCCL_IB_HCA": "mlx5"}) == 0
    page = capsys.readouterr().out
    assert "NCCL_IB_HCA = mlx5\n" in page
    assert "you set it; without your value it would be =mlx5_0" in " ".join(page.split())
    assert main(["--facts", folder, "--explain", "NCCL_DEBUG"], env={}) == 0
    assert "no rule says anything" in capsys.readouterr().out


def test_saved_facts_are_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--save", str(tmp_path / "facts")], env={}) == 0
    (written,) = capsys.readouterr().out.split()
    assert Path(written).exists()
    assert main(["--facts", str(tmp_path / "facts")], env={}) in (0, 1, 2)


def test_unusable_files_are_findings_and_the_rest_is_shown(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _save(tmp_path, recorded("dgx-a100"))
    good = json.loads(to_json(recorded("dgx-a100")))
    (tmp_path / "old.json").write_text(json.dumps(good | {"version": 7}))
    (tmp_path / "cut.json").write_text(json.dumps(good)[:500])
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert main(["--facts", folder], env={}) == 2
    page = capsys.readouterr().out
    assert page.count("facts-unreadable") == 3
    assert "reads version 1" in page
    assert "mlx5_0" in page


@pytest.mark.parametrize(
    "content", [None, "", "[]", '{"format": "other"}', '{"format": "railhead-fabric-facts", "version": 9}']
)
def test_nothing_to_look_at_is_a_sentence(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert main(["--facts", str(tmp_path)], env={}) == EXIT_NO_FACTS
    error = capsys.readouterr().err
    assert error.startswith("doctor: ")
    assert "Traceback" not in error
    assert main(["--facts", str(tmp_path / "absent")], env={}) == EXIT_NO_FACTS


@pytest.mark.parametrize(
    "argv", [["--nonsense"], ["--nnodes", "0"], ["--bind", "socket"], ["--address", "x"], ["extra"]]
)
def test_wrong_usage_is_not_an_error_found(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """argparse's own exit code 2 would read as "errors were found"; --address needs a caller that knows Ray."""
    with pytest.raises(SystemExit) as caught:
        main(argv, env={})
    assert caught.value.code == EXIT_USAGE
    assert "usage:" in capsys.readouterr().err


class FakeNodes:
    """A cluster of recorded machines whose peers are in memory."""

    def __init__(self, nodes: list[NodeFacts], silent: list[Finding], peers: list[FakePeer]) -> None:
        self.nodes, self.silent, self._peers, self.is_closed = nodes, silent, peers, False

    def look(self) -> tuple[list[NodeFacts], list[Finding]]:
        return self.nodes, self.silent

    def peers(self) -> list[FakePeer]:
        return self._peers

    def close(self) -> None:
        self.is_closed = True


def test_a_ray_cluster_is_looked_at_through_the_callers_connection(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    nodes = FakeNodes([recorded("dgx-a100")], [], [])

    def connect(address: str) -> FakeNodes:
        asked.append(address)
        return nodes

    assert main(["--address", "10.0.0.1:6379"], connect=connect, env={}) == 0
    assert asked == ["10.0.0.1:6379"]
    assert nodes.is_closed
    assert "The nodes of the Ray cluster at 10.0.0.1:6379" in capsys.readouterr().out


def test_a_node_that_says_nothing_is_a_finding_and_a_cluster_of_them_a_sentence(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    silent = [Finding("facts-unreadable", Severity.ERROR, ("b",), "b says nothing", "unseen", "install it there")]
    assert main(["--address", "x:1"], connect=lambda _: FakeNodes([recorded("dgx-a100")], silent, []), env={}) == 2
    assert "b says nothing" in capsys.readouterr().out
    nobody = FakeNodes([], silent, [])
    assert main(["--address", "x:1"], connect=lambda _: nobody, env={}) == EXIT_NO_FACTS
    assert "b says nothing" in capsys.readouterr().err
    assert nobody.is_closed


def test_garbage_below_the_root_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sys").write_bytes(b"\xff")
    assert main([], env={}, root=tmp_path) in (0, 2)
    assert "unknown: no GPU" in capsys.readouterr().out


def test_probe_measures_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--probe"], env={}) in (0, 1, 2)
    assert "accept connections" in capsys.readouterr().out


def test_probe_of_an_address_that_is_not_here_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--probe", "--node-ip", "127.0.0.1"], env={}) in (0, 1, 2)
    capsys.readouterr()
    assert main(["--probe", "--node-ip", "192.0.2.200"], env={}) == 2
    assert "192.0.2.200" in capsys.readouterr().out


def test_probe_of_a_cluster_measures_between_its_nodes(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [replace(recorded("gpuless-microvm"), hostname=f"n{idx}") for idx in range(4)]
    peers = gang(4)
    peers[2].rate /= 2
    code = main(
        ["--address", "x:1", "--probe"], connect=lambda _: FakeNodes(nodes, [], peers), env={"GLOO_SOCKET_IFNAME": "e"}
    )
    assert code == 2
    page = capsys.readouterr().out
    assert "node-slow  on n2" in page
    assert "all-reduces over gloo" in page


def test_probe_of_recorded_facts_says_that_nothing_was_measured(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--facts", _save(tmp_path, recorded("dgx-a100")), "--probe"], env={}) == 0
    assert "Nothing was measured" in capsys.readouterr().out


def test_the_launcher_knows_the_doctor(recorded: Recorded, tmp_path: Path) -> None:
    """As users call it: the launcher's own exit codes must not get in the way of the doctor's."""
    folder = _save(tmp_path, recorded("dgx-a100"))
    command = [sys.executable, "-m", "launcher", "doctor"]
    done = subprocess.run([*command, "--facts", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "8 GPUs" in done.stdout
    wrong = subprocess.run([*command, "--nonsense"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == EXIT_USAGE
