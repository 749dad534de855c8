"""securerun in torchrun's place: the same command lines, the same output, status, files, signals and surroundings."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator

import pytest
from hosts import Host, Network, eventually
from parity import JOB, RUN_ID, WORLD, Pair, Seen

_MASTER = ("--master-addr", "10.77.0.1", "--master-port", "29500")
# How two nodes meet, by --nnodes: each node's options.
_ELASTIC = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", RUN_ID)
_PATIENCE = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=5"
_MEETINGS: dict[str, list[tuple[str, ...]]] = {
    "2": [(*_MASTER, "--node-rank", "0"), (*_MASTER, "--node-rank", "1")],
    "1:2": [
        (*_ELASTIC, "--rdzv-conf", f"is_host=1,{_PATIENCE}", "--local-addr", "10.77.0.1"),
        (*_ELASTIC, "--rdzv-conf", f"is_host=0,{_PATIENCE}", "--local-addr", "10.77.0.2"),
    ],
}
# Means nothing to torchrun; it may not differ, so both are told.
_PEERS = {"SECURERUN_PEERS": "10.77.0.1,10.77.0.2"}


@pytest.fixture(scope="module")
def networks(root_and_tools: None) -> Iterator[tuple[Network, Network]]:
    """One for each launcher, with the same names and addresses in both."""
    with Network("node0", "node1") as first, Network("node0", "node1") as second:
        yield first, second


@pytest.fixture(params=["guarded", "apart"])
def pair(
    request: pytest.FixtureRequest, networks: tuple[Network, Network], tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    """securerun with a guard and, for launches of one node, in a network of the job's own."""
    return Pair(tmp_path_factory.mktemp("pair"), networks, apart=request.param == "apart")


def _shell(script: str) -> list[str]:
    """A prefix that lets a shell arrange things before it becomes the launcher, its "$@"."""
    return ["bash", "-c", script, "shell"]


def _listens(node: Host, port: int) -> bool:
    return port in {listening for _, listening in node.listening()}


@pytest.mark.parametrize(
    ("arguments", "says", "reads"),
    [
        (("--nproc-per-node", "2", WORLD, "--", "--nproc-per-node", "3"), "['--nproc-per-node', '3']", "words\n"),
        (("--", WORLD, "--", "--peers"), "['--', '--peers']", "words\n"),
        (("--standalone", "-m", "parity_world", "a", "--", "-m"), "['a', '--', '-m']", "words\n"),
        (("--no-python", sys.executable, WORLD, "a"), "['a']", "words\n"),
        (("--run-path", WORLD, "a"), "['a']", ""),
        (("--run-path", "--start-method", "forkserver", WORLD), "[]", ""),
        pytest.param(("--run-path", "--start-method", "fork", WORLD), "[]", "", marks=pytest.mark.apart),
        pytest.param((*_MASTER, WORLD), "[]", "words\n", marks=pytest.mark.apart),
    ],
    ids=["script", "dashes", "module", "no-python", "run-path", "forkserver", "fork", "static"],
)
def test_workers_find_the_world_that_torchrun_gives_them(
    pair: Pair, arguments: tuple[str, ...], says: str, reads: str
) -> None:
    seen = pair.run(*arguments, env={"LOGLEVEL": "INFO"}, prefix=_shell('echo words | "$@"'))
    assert seen.status == [0], seen
    assert f"worker 0 says {says}" in seen.output
    assert "worker 0 complains" in seen.errors
    assert seen.world()["input"] == reads


@pytest.mark.apart
def test_the_environment_says_what_options_say(pair: Pair) -> None:
    settings = {
        "PET_NPROC_PER_NODE": "2",
        "PET_MAX_RESTARTS": "3",
        "PET_ROLE": "trainer",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "localhost:29400",
        "PET_RDZV_ID": RUN_ID,
        "PET_MONITOR_INTERVAL": "0.05",
        "PET_LOG_DIR": "logs",
        "PET_TEE": "1",
        "PET_MODULE": "1",
        "PET_RUN_PATH": "0",
    }
    seen = pair.run("parity_world", "a", env={"LOGLEVEL": "INFO", **settings})
    assert (seen.status, seen.output) == (
        [0],
        ["[trainer0]:worker 0 says ['a']", "[trainer1]:worker 1 says ['a']"],
    )
    assert "logs/sameid_RANDOM/attempt_0/1/stdout.log" in seen.files


def test_options_may_be_abbreviated_and_run_together(pair: Pair) -> None:
    options = ("--nproc-per", "2", "--max_r=1", "--rol", "trainer", "--log-d=logs", "--stand", "-mr3")
    seen = pair.run(*options, "parity_world", "--peers", env={"LOGLEVEL": "INFO"})
    assert (seen.status, seen.output) == ([0], [])
    assert seen.files["logs/UUID_RANDOM/attempt_0/1/stdout.log"].content == "worker 1 says ['--peers']\n"
    assert any(re.search(r"\]   max_restarts +: 1$", line) for line in seen.errors), seen.errors


@pytest.mark.apart
def test_limits_priority_and_ignored_signals_are_handed_on(pair: Pair) -> None:
    arrange = (
        "trap '' HUP USR2; ulimit -c 0; ulimit -n 512; exec 9< /dev/null; exec setarch -R nice -n 3 choom -n 77 -- "
        'taskset -c 0 "$@" < parity_input'
    )
    pair.touch("parity_input")
    seen = pair.run(WORLD, prefix=_shell(arrange), umask=0o077, module="run")
    itself = seen.world()["itself"]
    assert isinstance(itself, dict)
    assert (itself["nice"], itself["oom_score_adj"], itself["Umask"], itself["Cpus_allowed_list"]) == (
        *(os.getpriority(os.PRIO_PROCESS, 0) + 3, ["77"]),
        *("0077", "0"),
    )
    assert seen.files["world"].mode == "0700"


@pytest.mark.parametrize("option", ["--use-env", "--master-port=29500"])
def test_scripts_of_the_old_launch_module_find_what_they_found(pair: Pair, option: str) -> None:
    seen = pair.run(option, "--nproc-per-node", "2", WORLD, module="launch")
    told = [] if option == "--use-env" else ["--local-rank=1"]
    assert (seen.status, seen.output[1]) == ([0], f"worker 1 says {told}")


@pytest.mark.apart
def test_a_terminal_is_a_terminal_and_ctrl_c_ends_the_job(pair: Pair) -> None:
    pair.start("--nproc-per-node", "2", JOB, "wait", terminal=True)
    pair.wait_for("up.*", count=2)
    pair.type(b"\x03")
    seen = pair.end()
    assert seen.status == [1]
    assert {"worker 0 got SIGINT", "worker 1 got SIGINT"} <= set(seen.output)


@pytest.mark.parametrize("name", [pytest.param("SIGTERM", marks=pytest.mark.apart), "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_a_signal_that_the_launcher_handles_is_passed_to_the_workers(pair: Pair, name: str) -> None:
    handled = ["--signals-to-handle", "SIGUSR1,SIGTERM"] if name == "SIGUSR1" else []
    pair.start(*handled, "--nproc-per-node", "2", JOB, "wait")
    pair.wait_for("up.*", count=2)
    pair.signal(signal.Signals[name])
    seen = pair.end()
    assert (seen.status, seen.output) == ([1], [f"worker 0 got {name}", f"worker 1 got {name}"])
    assert any("SignalException" in line for line in seen.errors)


@pytest.mark.parametrize("name", ["SIGUSR1", pytest.param("SIGKILL", marks=pytest.mark.apart)])
def test_a_signal_that_it_does_not_handle_ends_the_launcher_with_that_status(pair: Pair, name: str) -> None:
    """Under torchrun the workers then live on; securerun's guard ends them, as other tests show."""
    pair.start(JOB, "wait")
    pair.wait_for("up.0")
    pair.signal(signal.Signals[name])
    pair.wait()
    pair.touch("over")
    of_torchrun, of_securerun = pair.end_differently()
    assert of_securerun.status == of_torchrun.status == [-signal.Signals[name]]
    assert of_securerun.errors == of_torchrun.errors == []


@pytest.mark.in_this_network
def test_a_launcher_that_waits_for_other_nodes_ends_by_sigterm(pair: Pair) -> None:
    pair.start("--nnodes", "2", *_MASTER, WORLD, env=_PEERS)
    assert eventually(lambda: all(_listens(side.nodes[0], 29500) for side in pair.sides), seconds=60)
    pair.signal(signal.SIGTERM)
    assert pair.end().status == [-signal.SIGTERM]


def test_signals_to_workers_are_the_workers_business(pair: Pair) -> None:
    pair.start("--nproc-per-node", "2", JOB, "wait")
    pair.wait_for("up.*", count=2)
    pair.signal_worker(0, signal.SIGUSR1)
    pair.signal_worker(1, signal.SIGKILL)
    seen = pair.end()
    assert (seen.status, seen.output) == ([1], ["worker 0 got SIGUSR1"])
    assert any("exitcode  : -9" in line for line in seen.errors)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "the following arguments are required: training_script"),
        (("--bogus", WORLD), 2, "unrecognized arguments: --bogus"),
        (("--rdzv", "c10d", WORLD), 2, "ambiguous option: --rdzv could match --rdzv-backend"),
        (("--nproc-per-node", "many", WORLD), 1, "ValueError: Unsupported nproc_per_node value: many"),
        (("--redirects", "9", WORLD), 1, "ValueError: "),
        (("--rdzv-backend", "carrier-pigeon", WORLD), 1, "The rendezvous backend 'carrier-pigeon' is not registered"),
        (("--no-python", "no-such-command"), 1, "FileNotFoundError: "),
        (("no-such-script.py",), 1, "can't open file 'PLACE/no-such-script.py'"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else None,
)
def test_mistakes_get_torchruns_answer(pair: Pair, arguments: tuple[str, ...], status: int, message: str) -> None:
    seen = pair.run(*arguments, env={"TORCHELASTIC_ERROR_FILE": "error.json"})
    assert (seen.status, seen.output) == ([status], [])
    assert message in "\n".join(seen.errors)


def test_a_wrong_variable_gets_torchruns_answer(pair: Pair) -> None:
    seen = pair.run(WORLD, env={"PET_STANDALONE": "true", "TORCHELASTIC_ERROR_FILE": "error.json"})
    assert seen.status == [1]
    assert "invalid literal for int() with base 10: 'true'" in str(seen.files["error.json"].content)


@pytest.mark.in_this_network
@pytest.mark.parametrize("arguments", [("--nnodes", "2:1"), ("--rdzv-endpoint", "node0")])
def test_launches_that_are_refused_in_one_line_fail_under_torchrun_too(pair: Pair, arguments: tuple[str, ...]) -> None:
    pair.start(*arguments, WORLD)
    of_torchrun, of_securerun = pair.end_differently()
    assert (of_torchrun.status, of_securerun.status) == ([1], [2])
    assert of_torchrun.output == of_securerun.output == []


def test_help_is_torchruns_and_then_ours(pair: Pair) -> None:
    pair.start("--help")
    of_torchrun, of_securerun = pair.end_differently()
    assert of_torchrun.status == of_securerun.status == [0]
    assert len(of_torchrun.output) > 40
    assert set(of_torchrun.output) <= set(of_securerun.output)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("exit", "exitcode  : 3 (pid: N)"),
        ("signal", "Signal 11 (SIGSEGV) received by PID N"),
        pytest.param("exception", "ValueError: the loss is no number", marks=pytest.mark.apart),
    ],
)
def test_a_worker_that_fails_is_reported_restarted_and_written_down(pair: Pair, how: str, words: str) -> None:
    restarts = "1" if how == "exit" else "0"
    options = ("--nproc-per-node", "2", "--max-restarts", restarts, "--log-dir", "logs", "--tee", "1", "--standalone")
    seen = pair.run(*options, JOB, "fail", how, env={"TORCHELASTIC_ERROR_FILE": "error.json"})
    assert seen.status == [1]
    assert words in "\n".join(seen.errors)
    assert f"[default0]:attempt {restarts} of 0" in seen.output
    assert "[default0]:worker 0 got SIGTERM" in seen.output
    assert f"logs/UUID_RANDOM/attempt_{restarts}/1/stdout.log" in seen.files
    assert ("error.json" in seen.files) == (how == "exception")


@pytest.mark.apart
def test_logs_lie_where_torchrun_puts_them(pair: Pair) -> None:
    options = (
        *("--nproc-per-node", "3", "--log-dir", "logs", "--redirects", "0:1,1:2", "--tee", "1:1,2:3"),
        *("--local-ranks-filter", "0,2", "--duplicate-stdout-filters", "apple", "--rdzv-id", RUN_ID, *_MASTER),
    )
    seen = pair.run(*options, JOB, "streams", env={"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${role_name} ${rank}] "})
    if any("unrecognized arguments: " in line for line in seen.errors):
        pytest.skip("this torch has not all of these options")
    assert seen.status == [0]
    assert "[default 2] line 1 of 2: pear" in seen.output
    directory = f"logs/{RUN_ID}_RANDOM/attempt_0"
    assert {f"{directory}/filtered_stdout.log", f"{directory}/1/stderr.log"} <= seen.files.keys()
    # What torchrun leaves readable for everybody; the umask and the seal are the differences that are wanted.
    assert seen.files[f"{directory}/0/stdout.log"].mode == "0440"


@pytest.mark.apart
def test_output_is_passed_on_byte_for_byte_in_order(pair: Pair) -> None:
    seen = pair.run(JOB, "streams", prefix=_shell('(umask 077; : > out; : > err); exec "$@" > out 2> err'))
    assert (seen.status, seen.output, seen.errors) == ([0], [], [])
    assert str(seen.files["out"].content).endswith("\\xff\\xfe bytes\nthe end without a newline, of 0")
    assert str(seen.files["err"].content).splitlines()[-1] == "complaint 2 of 0"


@pytest.mark.parametrize(
    "streams", [pytest.param("<&- 2>&-", marks=pytest.mark.apart), "2>/dev/full", "2> >(exec true)"]
)
def test_a_job_needs_nobody_who_listens(pair: Pair, streams: str) -> None:
    # Words that a buffer still holds at the exit would be told by the status too.
    seen = pair.run(WORLD, prefix=_shell(f'exec "$@" {streams}'), env={"PYTHONUNBUFFERED": None})
    assert (seen.status, seen.output) == ([0], ["worker 0 says []"])


@pytest.mark.apart
def test_a_job_that_ends_well_may_leave_processes_behind(pair: Pair) -> None:
    seen = pair.run(JOB, "leave")
    assert seen.status == [0]
    for side in pair.sides:
        assert [command for command in side.processes() if command.endswith(" left")]
    pair.touch("over")
    assert eventually(lambda: not any(side.processes() for side in pair.sides), seconds=10)


@pytest.mark.in_this_network
def test_python_callers_get_what_torchruns_main_gives(pair: Pair) -> None:
    call = (
        "import importlib, sys\n"
        "module = {'torchrun': 'torch.distributed.run', 'securerun': 'securerun.run'}[sys.argv[2].split('/')[-1]]\n"
        "try:\n"
        f"    importlib.import_module(module).main(['--nproc-per-node', '2', {JOB!r}, 'fail', 'exit'])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, {rank: failure.exitcode for rank, failure in error.failures.items()})\n"
        "print(sys.argv[3:])\n"
    )
    seen = pair.run("untouched", prefix=[sys.executable, "-c", call])
    assert (seen.status, seen.output[0], seen.output[-1]) == ([0], "ChildFailedError {1: 3}", "worker 0 got SIGTERM")
    assert "['untouched']" in seen.output


@pytest.mark.in_this_network
@pytest.mark.parametrize("nnodes", ["2", "1:2"])
def test_two_nodes_form_the_group_that_torchrun_forms(pair: Pair, nnodes: str) -> None:
    for node, meeting in enumerate(_MEETINGS[nnodes]):
        pair.start("--nnodes", nnodes, *meeting, "--nproc-per-node", "2", WORLD, str(node), node=node, env=_PEERS)
    seen = pair.end()
    assert seen.status == [0, 0]
    assert seen.output == [f"worker {rank} says ['{rank // 2}']" for rank in range(4)]


def test_nodes_come_and_go_as_under_torchrun(
    networks: tuple[Network, Network], tmp_path_factory: pytest.TempPathFactory
) -> None:
    tries = (_come_and_go(Pair(tmp_path_factory.mktemp("pair"), networks)) for _ in range(3))
    seen = next(filter(None, tries), None)
    assert seen is not None, "torch aborts each time"
    assert seen.status == [0, 1]


def _come_and_go(pair: Pair) -> Seen | None:
    """Return what was seen; None where an agent of torch's aborted, as it may when it gets SIGTERM."""
    # torchrun 2.13 cannot grow while the workers use its own store: both agents wait for MASTER_ADDR.
    env = {**_PEERS, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first, second = (("--nnodes", "1:2", "--max-restarts", "1", *meeting) for meeting in _MEETINGS["1:2"])
    pair.start(*first, JOB, "generations", env=env)
    pair.wait_for("0.0.1")
    pair.start(*second, JOB, "generations", node=1, env=env)
    pair.wait_for("0.[01].2", count=2)
    pair.signal(signal.SIGTERM)
    pair.touch("fail.0")
    pair.wait_for("1.0.1")
    pair.touch("over")
    both = pair.end_differently()
    # A thread of its store's that nobody joins is still there when the process ends, now and then (torch 2.13).
    aborted = any("terminate called without an active exception" in seen.errors for seen in both)
    return None if aborted else pair.same(*both)
