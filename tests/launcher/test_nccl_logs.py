"""NCCL's logs of a job's own ranks: read as they grow, told once, held against what the hardware promises."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.checkup import Checkup
from launcher.cluster.local import LocalCluster
from launcher.fabric.facts import NodeFacts
from launcher.gang.events import AttemptEnded, Event, FabricFound, Notice, TransportSeen
from launcher.node import survey
from launcher.node.nccl_logs import MAX_FILE_BYTES, QUIET_S, NcclLogs, NcclPaths
from launcher.spec import JobSpec, Program, ProgramKind
from tests.contracts.cluster_contract import House
from tests.launcher.fabric.machines import healthy_facts

CHANNEL = "hostA:7:19 [0] NCCL INFO Channel 0{}/0 : 0[0] -> 1[0] [send] via NET/{}\n"
BEGIN = (
    "hostA:7:19 [0] NCCL INFO NCCL version 2.27.5+cuda12.9\nhostA:7:19 [0] NCCL INFO NET/IB : No device found.\n"
    "hostA:7:19 [0] NCCL INFO Using network Socket\n"
)


class Reading:
    """The logs of an attempt in a directory, and what was told of them."""

    def __init__(self, directory: Path) -> None:
        self.told: list[TransportSeen] = []
        self.paths = NcclPaths(str(directory), "10.0.0.1#2")
        self.output = directory / "stdout.log"
        self.logs = NcclLogs(3, "hostA", "infiniband", self.paths, [str(self.output)], self.told.append)

    def write(self, text: str, pid: int = 7) -> None:
        assert self.paths.log_pattern is not None
        with open(self.paths.log_pattern.replace("%p", str(pid)), "a") as log:
            log.write(text)


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    directory = tmp_path / "attempt [3]"  # a name that a glob would misread
    directory.mkdir()
    return Reading(directory)


def test_what_the_logs_say_is_told_once_they_are_quiet(reading: Reading) -> None:
    """Channels of a communicator come within moments of each other, some lines in two pieces: half a story would accuse half a node."""
    reading.write(BEGIN)
    reading.logs.look(0.0)
    reading.write(CHANNEL.format(0, "Socket/0")[:50])
    reading.logs.look(1.0)
    reading.write(CHANNEL.format(0, "Socket/0")[50:])
    reading.write(BEGIN + CHANNEL.format(1, "Socket/0"), pid=8)
    reading.logs.look(2.0)
    reading.logs.look(1.9 + QUIET_S)
    assert reading.told == []
    reading.logs.look(2.0 + QUIET_S)
    reading.logs.look(60.0)
    (event,) = reading.told
    assert (event.attempt, event.node_id, event.hostname, event.expected) == (3, "10.0.0.1#2", "hostA", "infiniband")
    assert (event.version, event.network, event.channels) == ("2.27.5", "Socket", (("NET/Socket", 2),))


def test_channels_that_come_later_are_told_with_the_first(reading: Reading) -> None:
    """A communicator that is made in the hundredth step may fall back alone."""
    reading.write(CHANNEL.format(0, "IB/0/GDRDMA"))
    reading.logs.look(0.0)
    reading.logs.look(QUIET_S)
    reading.write(CHANNEL.format(1, "Socket/0"))
    reading.logs.look(100.0)
    reading.logs.look(101.0, is_last=True)
    assert [dict(event.channels) for event in reading.told] == [
        {"NET/IB/GDRDMA": 1},
        {"NET/IB/GDRDMA": 1, "NET/Socket": 1},
    ]


def test_where_the_user_has_nccl_log_to_the_output_it_is_read_there(reading: Reading) -> None:
    reading.output.write_text("loss 0.1 via dolorosa\n" + CHANNEL.format(0, "IB/0"))
    reading.logs.look(0.0, is_last=True)
    assert [dict(event.channels) for event in reading.told] == [{"NET/IB": 1}]


def test_logs_that_say_nothing_of_channels_prove_nothing(reading: Reading) -> None:
    reading.logs.look(0.0, is_last=True)
    reading.write(BEGIN)
    reading.logs.look(1.0, is_last=True)
    assert reading.told == []


def test_a_log_without_an_end_is_not_read_for_ever(reading: Reading) -> None:
    """NCCL_DEBUG=TRACE writes gigabytes; and a line without an end must not fill the agent's memory."""
    reading.output.write_bytes(b"x" * (MAX_FILE_BYTES + 100))
    with open(reading.output, "a") as output:
        output.write("\n" + CHANNEL.format(0, "Socket/0"))
    for second in range(3):
        reading.logs.look(float(second), is_last=True)
    assert reading.told == []


def test_another_nodes_logs_in_a_shared_run_directory_are_left_to_it(reading: Reading) -> None:
    other = NcclPaths(reading.paths.directory, "10.0.0.2#2")
    assert other.log_pattern is not None
    Path(other.log_pattern.replace("%p", "9")).write_text(CHANNEL.format(0, "Socket/0"))
    reading.logs.look(0.0, is_last=True)
    assert reading.told == []
    assert NcclPaths("/runs/100%/attempt_0", "n0").log_pattern is None, "NCCL would read the percent sign as a pattern"


# --- through an agent: its ranks write what NCCL would ----------------------------------------------------------------------------------

WRITER = f"""
import os, sys
path = os.environ.get("NCCL_DEBUG_FILE")
print(os.environ.get("NCCL_DEBUG"), path)
text = {BEGIN + CHANNEL.format(0, "Socket/0")!r}
if path: open(path.replace("%p", str(os.getpid())), "w").write(text)
else: print(text)
"""


@pytest.fixture
def dgx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NodeFacts:
    facts = healthy_facts("dgx-a100", tmp_path / "dgx")
    monkeypatch.setattr("launcher.fabric.probe.probe", lambda **_: facts)
    monkeypatch.setattr(survey, "_GPU_SIGNS", ("/",))
    return facts


@pytest.fixture
def run(tmp_path: Path, dgx: NodeFacts) -> Iterator[Callable[..., House]]:
    houses = []

    def start(**env: str) -> House:
        house = House(lambda: LocalCluster(2, {**os.environ, **env}), tmp_path, 2)
        houses.append(house)
        house._script.write_text(WRITER)
        world = house.begin("x")
        house.start(world)
        house.sink.wait_for(TransportSeen, 2)
        house.stop(world)
        house.sink.wait_for(AttemptEnded, 2)
        return house

    yield start
    for house in houses:
        house.cluster.close()


def test_ranks_on_gpu_nodes_log_to_the_run_directory_and_the_agent_says_what_carries_them(
    run: Callable[..., House],
) -> None:
    """Otherwise a job that silently runs over TCP looks like a slow model."""
    house = run()
    for event in house.sink.of(TransportSeen):
        assert (event.expected, event.network) == ("infiniband", "Socket")
        assert event.channels == (("NET/Socket", 2),), (
            "each of the node's two ranks has one, and no other node's are among them"
        )
    for output in house.run_dir.glob("attempt_0/rank_*/stdout.log"):
        assert output.read_text().startswith(f"INFO {house.run_dir}/attempt_0/nccl.")


def test_a_users_own_nccl_debug_stays_and_is_read_from_the_output(run: Callable[..., House]) -> None:
    house = run(NCCL_DEBUG="INFO")
    assert all(event.channels == (("NET/Socket", 2),) for event in house.sink.of(TransportSeen))
    for output in house.run_dir.glob("attempt_0/rank_*/stdout.log"):
        assert output.read_text().startswith("INFO None\n")


# --- the launcher's word on it --------------------------------------------------------------------------------------------------------


def _seen(idx: int, way: str, expected: str = "infiniband") -> TransportSeen:
    return TransportSeen(0, f"n{idx}", f"host{idx}", expected, "2.27.5", "IB", ((way, 4), ("P2P", 2)))


@pytest.fixture
def checkup(tmp_path: Path) -> Iterator[tuple[Checkup, list[Event]]]:
    said: list[Event] = []
    checkup = Checkup(JobSpec(Program(ProgramKind.SCRIPT, "train.py"), 3, 3), str(tmp_path), said.append)
    yield checkup, said
    checkup.close()


def test_a_fall_back_of_many_nodes_is_one_finding(checkup: tuple[Checkup, list[Event]], tmp_path: Path) -> None:
    """A thousand lines of the same are read by nobody."""
    it, said = checkup
    for idx in range(3):
        it.transport(_seen(idx, "NET/Socket" if idx else "NET/IB/GDRDMA"))
    it.close()
    (found,) = [event for event in said if isinstance(event, FabricFound)]
    assert (found.id, found.severity, found.hosts) == ("tcp-fallback", "ERROR", ("host1", "host2"))
    (notice,) = [event for event in said if isinstance(event, Notice)]
    assert notice.text == "NCCL's logs: between nodes NET/IB/GDRDMA and NET/Socket"
    page = (tmp_path / "fabric" / "transport.txt").read_text().splitlines()
    assert page[0] == "host0: NET/IB/GDRDMA (4 channels), P2P (2 channels); NCCL 2.27.5; the node has infiniband"
    assert len(page) == 3


def test_proof_of_rdma_is_said_once_and_a_restart_says_nothing_new(
    checkup: tuple[Checkup, list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.checkup.GATHER_S", 0.0)
    it, said = checkup
    for way in ("NET/IB/GDRDMA", "NET/IB/GDRDMA", "NET/IB", "NET/IB"):
        it.transport(_seen(0, way))
    it.close()
    (notice,) = [event for event in said if isinstance(event, Notice)]
    assert notice.text == "NCCL's logs: between nodes NET/IB/GDRDMA"
    assert [event.id for event in said if isinstance(event, FabricFound)] == ["gpudirect-unused"]
