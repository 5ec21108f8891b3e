"""A command line means one job in one place; what cannot be meant is refused at once, with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.cli import check_program, main
from launcher.errors import EXIT_USAGE, SpecError
from launcher.options.carry import carried_environment
from launcher.options.devices import visible_count
from launcher.options.intent import Intent, understand
from launcher.options.parse import parse
from launcher.options.table import OPTIONS
from launcher.spec import CacheOptions, Program, ProgramKind, Stream


def meant(command: str, environ: Mapping[str, str] | None = None) -> Intent:
    return understand(parse(command.split(), environ or {}), environ or {}, "/here", "fresh")


def test_nothing_but_a_script_is_one_rank_on_this_machine() -> None:
    intent = meant("train.py")
    spec = intent.spec
    assert (spec.min_nodes, spec.max_nodes, spec.nproc_per_node, intent.address, intent.notes) == (1, 1, 1, None, ())
    assert spec.program == Program(ProgramKind.SCRIPT, "train.py")
    assert (spec.cwd, spec.run_id, spec.restarts.max_restarts) == ("/here", "fresh", 0)


def test_flags_reach_the_spec() -> None:
    spec = meant(
        "--nnodes 2:4 --nproc-per-node 8 --address h:1 --cpus-per-proc 4 --gpus-per-proc 0.5 --resources rdma=1 --max-restarts 3 "
        "--shutdown-timeout 5 --place-timeout 60 --role r --rdzv-id id --master-port 29501 --cache-dir /c --cache-capacity 1GiB "
        "--cache-peers off --virtual-local-rank --bind none --preflight -m pkg.train --lr 0.1"
    ).spec
    assert (spec.min_nodes, spec.max_nodes, spec.nproc_per_node) == (2, 4, 8)
    assert (spec.resources.cpus_per_proc, spec.resources.gpus_per_proc, spec.resources.per_node) == (
        4,
        0.5,
        (("rdma", 1.0),),
    )
    assert (spec.restarts.max_restarts, spec.shutdown_timeout_s, spec.place_timeout_s) == (3, 5, 60)
    assert (spec.role, spec.run_id, spec.master_port, spec.virtual_local_rank) == ("r", "id", 29501, True)
    assert (spec.bind, spec.preflight) == ("none", True)
    assert spec.cache == CacheOptions("/c", "1GiB", peers="off")
    assert spec.program == Program(ProgramKind.MODULE, "pkg.train", ("--lr", "0.1"))


@pytest.mark.parametrize(
    ("words", "bind", "num_notes"),
    [
        ("", "auto", 0),
        ("--bind numa", "numa", 0),
        ("--numa-binding node", "numa", 0),
        ("--numa-binding socket --bind numa", "numa", 0),
        ("--numa-binding exclusive", "numa", 1),
    ],
)
def test_torchruns_numa_binding_is_our_binding(words: str, bind: str, num_notes: int) -> None:
    """A command line that binds under torchrun binds here; where it asks for finer pieces, that is said."""
    intent = meant(f"{words} t.py")
    assert (intent.spec.bind, len(intent.notes)) == (bind, num_notes)


@pytest.mark.parametrize("words", ["--bind socket", "--numa-binding gpu", "--bind none --numa-binding node"])
def test_bindings_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(SpecError):
        meant(f"{words} t.py")


def test_output_flags_reach_the_spec() -> None:
    logs = meant(
        "--log-dir d -r 0:1,1:3 -t 2 --local-ranks-filter 0,1 --duplicate-stdout-filters loss,a,,b t.py"
    ).spec.logs
    assert (logs.log_dir, logs.redirects.of(1), logs.tee.of(7)) == ("d", Stream.BOTH, Stream.STDERR)
    assert logs.local_ranks_filter == frozenset({0, 1})
    assert logs.duplicate_stdout_filters == ("loss", "a,b")


@pytest.mark.parametrize(
    ("words", "ranks", "everyone"),
    [("all", None, True), ("none", frozenset(), False), ("0,8-10", frozenset({0, 8, 9, 10}), False)],
)
def test_shown_ranks_are_all_none_or_listed(words: str, ranks: frozenset[int] | None, everyone: bool) -> None:
    logs = meant(f"--nproc-per-node 16 --show-ranks {words} t.py").spec.logs
    assert (logs.show_ranks, logs.show_all) == (ranks, everyone)


def test_a_wish_for_ranks_is_kept_beside_the_spec() -> None:
    intent = meant("--nproc-per-node gpu --address auto t.py")
    assert (intent.procs_wish, intent.spec.nproc_per_node) == ("gpu", 1)


@pytest.mark.parametrize(
    ("flags", "environ", "address"),
    [
        ("--address h:6379", {"RAY_ADDRESS": "other:1"}, "h:6379"),
        ("", {"RAY_ADDRESS": "other:1"}, "other:1"),
        ("--standalone", {"RAY_ADDRESS": "other:1"}, None),
        ("", {"RAY_ADDRESS": "local"}, None),
        ("", {"RAY_ADDRESS": ""}, None),
        ("", {"PET_ADDRESS": "h:1"}, "h:1"),
    ],
)
def test_the_flag_names_the_cluster_then_the_environment(
    flags: str, environ: dict[str, str], address: str | None
) -> None:
    assert meant(f"{flags} t.py", environ).address == address


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--nnodes 2 t.py", ["asks for 2 nodes", "neither --address nor RAY_ADDRESS", "ray start --head"]),
        ("--nnodes 2 --node-rank 1 --master-addr h t.py", ["by hand (--node-rank, --master-addr) is torchrun's way"]),
        ("--nnodes 2 --standalone t.py", ["--standalone was given"]),
        ("--nnodes 3:2 t.py", ["--nnodes 3:2: expected"]),
        ("--nnodes two t.py", ["--nnodes two: expected N or MIN:MAX"]),
        ("--nproc-per-node 0 t.py", ["--nproc-per-node 0: expected at least 1 rank"]),
        ("--nproc_per_node many t.py", ["--nproc_per_node many: expected a whole number"]),
        ("--nproc-per-node xpu t.py", ["XPUs"]),
        ("--max-restarts=-1 t.py", ["--max-restarts -1: expected a whole number, 0 or more"]),
        ("--shutdown-timeout nan t.py", ["expected a number"]),
        ("--master-port 70000 t.py", ["expected a port"]),
        ("-r 4 t.py", ["-r 4: expected 0 to 3"]),
        ("--resources GPU=1 t.py", ["--gpus-per-proc"]),
        ("--resources rdma t.py", ["NAME=N pairs"]),
        ("--signals-to-handle SIGKILL t.py", ["SIGKILL is none"]),
        ("--signals-to-handle SIG_DFL t.py", ["SIG_DFL is none"]),
        ("--nproc-per-node 4000000 t.py", ["more than 1024 ranks"]),
        ("--show-ranks 3 --nproc-per-node 2 t.py", ["there are 2 ranks"]),
        ("--cache-dir /c --cache-capacity lots t.py", ["a number of bytes"]),
        ("--show-ranks 5-1 t.py", ["expected ranks like 0,8-15"]),
        ("--cache-dir /c t.py", ["--cache-capacity"]),
        ("--cache-capacity 1GiB t.py", ["--cache-dir"]),
        ("-m --no-python t.py", ["cannot both hold"]),
        ("--standalone --address h:1 t.py", ["leave one of them out"]),
        ("--address ray://h:10001 t.py", ["ray job submit"]),
        ("--address http://h:8265 t.py", ["ray job submit"]),
        ("--nnodes 2", ["no script to run"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_to_do(command: str, words: list[str]) -> None:
    address = {} if "--nnodes 2" in command and "no script" not in words[0] else {"RAY_ADDRESS": "h:1"}
    with pytest.raises(SpecError) as caught:
        meant(command, address)
    for word in words:
        assert word in str(caught.value)


def test_a_bad_variable_is_shown_as_it_was_set() -> None:
    with pytest.raises(SpecError, match="PET_NNODES=x: expected"):
        meant("t.py", {"PET_NNODES": "x"})


def test_flags_without_effect_get_one_line_for_each_reason() -> None:
    """The usual single-node command of torchrun must not drown the first lines of output."""
    notes = meant("--rdzv-backend c10d --rdzv-endpoint localhost:0 --monitor-interval 5 t.py").notes
    assert len(notes) == 2
    assert notes[0].startswith("--rdzv-backend c10d, --rdzv-endpoint localhost:0: no effect; ")


def test_asking_for_what_happens_anyway_needs_no_note() -> None:
    assert meant("--start-method spawn --standalone --max-restarts 0 t.py").notes == ()
    assert meant("--start-method fork t.py").notes == ()


def test_torchruns_three_start_methods_are_two_here() -> None:
    """Nothing is forked from the launcher itself, so fork is the fork server too."""
    methods = {
        word: meant(f"--start-method {word} t.py").spec.start_method.value for word in ("spawn", "fork", "forkserver")
    }
    assert methods == {"spawn": "spawn", "fork": "forkserver", "forkserver": "forkserver"}
    assert meant("t.py").spec.start_method.value == "forkserver"
    with pytest.raises(SpecError, match="spawn, fork or forkserver"):
        meant("--start-method exec t.py")


def test_a_range_from_one_node_runs_on_this_machine_and_says_so() -> None:
    intent = meant("--nnodes 1:4 t.py")
    assert (intent.spec.min_nodes, intent.spec.max_nodes) == (1, 1)
    assert "no Ray cluster is named" in intent.notes[0]


def test_the_shutdown_timeout_has_torchruns_variable() -> None:
    assert meant("t.py", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}).spec.shutdown_timeout_s == 7
    assert meant("--shutdown-timeout 0 t.py", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}).spec.shutdown_timeout_s == 0


def test_the_interpreter_of_python_exec_runs_the_script() -> None:
    assert meant("t.py", {"PYTHON_EXEC": "/x/python"}).spec.program.python == "/x/python"


# What goes along to other nodes.


def test_settings_of_libraries_go_along_and_descriptions_of_the_machine_do_not() -> None:
    here = {
        "NCCL_DEBUG": "INFO",
        "PYTHONPATH": "/shared",
        "PATH": "/bin",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
        "MY": "1",
    }
    assert carried_environment(here, ["MY"]) == {"MY": "1", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/shared"}


def test_a_launcher_started_by_a_rank_does_not_hand_on_that_ranks_surroundings() -> None:
    here = {
        "RAILHEAD_RUN_DIR": "/r",
        "RAILHEAD_CACHE_SOCKET": "/s",
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": "1",
        "MASTER_PORT": "1",
    }
    assert carried_environment(here, []) == {}


def test_a_submitted_jobs_python_path_is_left_to_ray() -> None:
    """On each node it holds that node's own copy of the working directory."""
    here = {"PYTHONPATH": "/tmp/ray/x", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert carried_environment(here, []) == {}


def test_nothing_is_carried_on_one_machine() -> None:
    assert meant("t.py", {"NCCL_DEBUG": "INFO"}).spec.env == {}


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        ("0", 1),
        ("1,0", 2),
        ("0,0", 0),
        ("5", 0),
        ("0,5,1", 1),
        ("GPU-b", 1),
        ("GPU-", 0),
        ("MIG-x/1", 1),
        ("-1", 0),
    ],
)
def test_gpus_are_counted_as_cuda_shows_them(visible: str | None, count: int) -> None:
    assert visible_count(["GPU-aa", "GPU-bb"], visible) == count


# The disk.


def test_a_missing_script_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "train.py").touch()
    with pytest.raises(SpecError, match=r"no such script.*\n.*did you mean .*train.py"):
        check_program(Program(ProgramKind.SCRIPT, str(tmp_path / "trian.py")))


def test_a_directory_is_a_script_only_with_a_main(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="directory without __main__"):
        check_program(Program(ProgramKind.SCRIPT, str(tmp_path)))
    (tmp_path / "__main__.py").touch()
    check_program(Program(ProgramKind.SCRIPT, str(tmp_path)))


def test_a_module_is_looked_for_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud").mkdir()
    (tmp_path / "loud" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    check_program(Program(ProgramKind.MODULE, "loud.train"))
    with pytest.raises(SpecError, match="no module quiet"):
        check_program(Program(ProgramKind.MODULE, "quiet.train"))


def test_a_program_that_is_not_there_is_refused() -> None:
    check_program(Program(ProgramKind.EXECUTABLE, "bash"))
    with pytest.raises(SpecError, match="no such program on PATH"):
        check_program(Program(ProgramKind.EXECUTABLE, "no-such-program-here"))


def test_a_mistake_ends_with_2_and_a_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nproc", "0", "train.py"]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("launcher: --nproc 0: expected at least 1 rank per node")


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nnodes", "2", "--help"]) == 0
    assert main(["--version"]) == 0
    assert "railhead 0." in capsys.readouterr().out


def test_a_fault_of_ours_ends_with_70_and_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never 1, which is the code of a script that raised."""

    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("launcher.options.parse.parse", broken)
    assert main(["train.py"]) == 70
    err = capsys.readouterr().err
    assert err.startswith("launcher: a fault in the launcher")
    assert "RuntimeError: ours" in err


def test_an_interrupt_before_anything_was_started_ends_with_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.options.parse.parse", interrupted)
    assert main(["train.py"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_manual_names_every_flag() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "launcher.md").read_text()
    assert [option.name for option in OPTIONS if f"`--{option.name}" not in manual] == []


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL"])
def test_credentials_that_do_not_go_along_are_said_once(name: str) -> None:
    """The first thing to know of a 403 that a node gets; with --carry-env there is nothing to say."""
    environ = {name: "x", "AZURE_STORAGE_ACCOUNT_KEY": "k"}
    flags = ["--address", "10.0.0.1:6379"]
    notes = understand(parse([*flags, "t.py"], environ), environ, "/").notes
    assert [note for note in notes if "--carry-env 'AWS_*'" in note] == [notes[-1]]
    assert notes[-1].startswith(f"{name} is set here")
    carried = parse([*flags, "--carry-env", "AWS_*", "t.py"], environ)
    assert not [note for note in understand(carried, environ, "/").notes if "AWS_" in note]
