"""Ranks and launches as the world has them: variables half-set, two runs at once, restarts, signals, hangs."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, Trainer, ranks, records, start_python
from torch.distributed import HashStore

from nanostack import launch
from nanostack.errors import UserError
from nanostack.launch import Launch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
LONG = ("--stages.0.tokens", "2560000")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        (WHOLE | {"RANK": "2"}, "RANK 2 is not one of WORLD_SIZE 2 ranks"),
        (WHOLE | {"RANK": "-1"}, "RANK -1 is not one of"),
        (WHOLE | {"WORLD_SIZE": ""}, "WORLD_SIZE is '', which is no whole number"),
        (WHOLE | {"LOCAL_RANK": "2"}, "LOCAL_RANK 2 cannot be"),
        (WHOLE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "abc"}, "LOCAL_RANK is 'abc', which is no whole number"),
        (WHOLE | {"MASTER_PORT": "70000"}, "MASTER_PORT 70000 is no port"),
        ({k: v for k, v in WHOLE.items() if not k.startswith("MASTER")}, "but MASTER_ADDR and MASTER_PORT not set"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but RANK is not set: every task would work alone"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "every task would work alone"),
    ],
)
def test_variables_that_cannot_be_are_told(monkeypatch, variables, message):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        launch.check_environment()


@pytest.mark.parametrize(
    "variables",
    [{}, WHOLE, {"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}],
)
def test_variables_that_can_be_pass(monkeypatch, variables):
    """The last ones are those of a batch script, which may call python without srun."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch.check_environment()


@pytest.mark.parametrize("command", [("grow.py", "ckpt.pt"), ("-m", "nanostack", "consolidate", "ckpt.pt", "whole.pt")])
def test_tasks_of_srun_do_not_all_write_the_same_file(command):
    done = start_python(*command, env={"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}).done()
    assert done.returncode == 2 and "SLURM_NTASKS is 3, but RANK is not set: every task would work alone" in done.stderr


def test_launch_knows_its_run_and_its_stop_by_its_own_attempts_only(tmp_path):
    """Also where the store is lost with its machine, or ends with each attempt, and an agent is left."""
    store, other = HashStore(), Launch(HashStore(), agents=["c"])
    assert not other.claimed(tmp_path)
    first = Launch(store, agents=["a", "b"])
    first.mark(tmp_path)
    later = Launch(HashStore(), agents=["b"])
    assert Launch(store, agents=["c"]).claimed(tmp_path) and later.claimed(tmp_path) and later.key == first.key
    assert not other.claimed(tmp_path) and not Launch(HashStore()).claimed(tmp_path)
    first.note_stop(143)
    assert Launch(HashStore(), agents=["b", "a"]).stop_noted(tmp_path) == 143
    assert other.stop_noted(tmp_path) == 0
    assert Launch(HashStore(), agents=["a", "b"]).stop_noted(tmp_path) == 143
    (tmp_path / launch.MARK).write_text("torn")
    assert not first.claimed(tmp_path)


def test_hosts_that_come_and_go_clear_the_note_of_the_stop_that_they_make(tmp_path):
    """An agent stops its ranks when another joins. When that one is lost the agents are those of the note again."""
    alone, both = Launch(HashStore(), agents=["a"]), Launch(HashStore(), agents=["a", "b"])
    alone.mark(tmp_path)
    alone.note_stop(143)
    assert both.stop_noted(tmp_path) == 0
    assert Launch(HashStore(), agents=["a"]).stop_noted(tmp_path) == 0 and Launch(HashStore(), agents=["b"]).claimed(tmp_path)


def test_tasks_that_all_think_they_are_alone_get_one_run_between_them(trainer):
    """As from a launcher that sets no variable we know."""
    first = trainer.start("run", *LONG)
    while not (trainer.folder / "run/metrics.jsonl").exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.05)
    message = trainer.refused("run", *LONG, "--resume")
    assert f"is in use by a run on {os.uname().nodename}, process {first.pid}: " in message
    first.send_signal(signal.SIGHUP)
    assert first.wait() == 129 and "stopped by a signal" in first.stdout.read()
    trainer.good("run", "--stages.0.tokens", str(256 * len(records(trainer.folder / "run"))), "--resume")


STOPPED_IN_A_STEP = """
import os, signal, sys
import train
from nanostack import parallel
from nanostack.config import load
run, steps = train.Run(load(sys.argv[1], sys.argv[2:])), []
def ask(*_):
    steps.append(run.recorder.step + 1)
    if len(steps) == 3 and parallel.rank() == parallel.world_size() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
run.state.model.register_forward_pre_hook(ask)
run.train()
print("steps", steps, run.recorder.step, flush=True)
parallel.leave(run.stop.exit_code)
"""


@pytest.mark.distributed
@pytest.mark.parametrize("number", [1, 2])
def test_signal_ends_the_run_with_the_step_at_hand_on_all_ranks(trainer, number):
    options = [TINY, "--data.path", trainer.corpus, "--out", trainer.folder / "run", "--eval_interval", "99999"]
    options += ["--micro_batch", str(8 // number)]
    if number == 1:
        process = start_python("-c", STOPPED_IN_A_STEP, *options, one_stream=True)
        done = process.done()
    else:
        done = ranks("-c", STOPPED_IN_A_STEP, *options, number=2)
    assert done.returncode == 143 and done.stdout.count("steps [1, 2, 3] 3") == number, done.stdout + done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("number", [1, 2])
def test_record_of_the_step_that_a_signal_ends_is_completed_when_the_run_goes_on(trainer, number):
    """A signal in a step after which an evaluation and samples are due: there is no time for them, and nothing is lost."""
    due = ("--eval_interval", "768", "--sample.interval", "768", "--micro_batch", str(8 // number))
    options = [TINY, "--data.path", trainer.corpus, "--out", trainer.folder / "run", *due]
    done = ranks("-c", STOPPED_IN_A_STEP, *options, number=number)
    assert done.returncode == 143, done.stdout + done.stderr
    last = records(trainer.folder / "run")[-1]
    assert last["due"] == [True, True] and last["val_loss"] is None and "texts" not in last and last["loss"]
    died = "import os, sys, train; from nanostack.config import load; run = train.Run(load(sys.argv[1], sys.argv[2:]));"
    died += "run.state.model.register_forward_pre_hook(lambda *_: os._exit(9)); run.train()"  # as it completes that record
    assert ranks("-c", died, *options, "--resume", number=number).returncode == 9
    trainer.good("run", *due, "--resume", processes=number)
    assert records(trainer.folder / "run") == records(trainer.good("whole", *due, processes=number))


def test_learning_to_grow_can_be_stopped(trainer):
    """Nothing of it is saved; the run learns anew, and ends as if it had not been stopped."""
    learn = (
        "--stages.0.tokens",
        "512",
        "--stages.1.tokens",
        "512",
        "--stages.1.growth.op",
        "learn",
        "--save_interval",
        "99999",
    )
    out, process = trainer.folder / "run", trainer.start("run", *learn, "--stages.1.growth.learn_steps", "100000")
    while "learning how to grow" not in process.stdout.read():
        assert process.poll() is None
        process.stdout.seek(0)
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    process.stdout.seek(0)
    assert "stopped by a signal while learning how to grow" in process.stdout.read()
    trainer.good("run", *learn, "--stages.1.growth.learn_steps", "2", "--resume")
    assert records(out) == records(trainer.good("whole", *learn, "--stages.1.growth.learn_steps", "2"))


def test_run_that_hangs_says_where_and_ends(trainer):
    program = "import sys, time, train; from nanostack.config import load; run = train.Run(load(sys.argv[1], sys.argv[2:]));"
    program += "run.state.model.register_forward_pre_hook(lambda *_: time.sleep(99)); run.train()"
    options = [TINY, "--data.path", trainer.corpus, "--out", trainer.folder / "run", "--hang_timeout", "2"]
    done = start_python("-c", program, *options).done()
    assert done.returncode == 75
    assert f"error: rank 0 on {os.uname().nodename} hangs in: train step; nothing has moved for " in done.stderr
    assert "Current thread" in done.stderr and "in accumulate" in done.stderr and "in _work" in done.stderr


TIMEOUTS = """
import torch, torch.distributed as dist
from nanostack import parallel
from nanostack.config import Parallel
mesh = parallel.start(Parallel(), "float32", compile=False, hang_timeout=100.0).mesh
groups = [dist.group.WORLD, mesh.get_group("shard"), mesh.get_group("replicate"), parallel._patient]
seconds = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
print(seconds == [160.0, 160.0, 160.0, 860.0], flush=True)
"""


@pytest.mark.distributed
def test_messages_fail_after_the_watchdog_and_those_that_wait_for_a_hash_or_a_save_much_later():
    done = ranks("-c", TIMEOUTS, number=2)
    assert done.stdout.split() == ["True"] * 2, done.stdout + done.stderr


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def torchrun(
    trainer: Trainer, *options: str, out: str = "run", overrides: tuple = LONG, processes: int = 1, env: dict | None = None
) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), *options]
    command += trainer.command(out, *overrides)[1:]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **pipes)


def wait_for(path, *processes: subprocess.Popen) -> None:
    while not path.exists():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.slow
def test_reused_rendezvous_id_does_not_adopt_the_run_of_another_launch(trainer):
    options = ("--max-restarts", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--rdzv_id", "100")
    few = ("--stages.0.tokens", "512", "--stages.1.tokens", "512")
    first = torchrun(trainer, *options, overrides=few)
    said = first.communicate()[0]
    assert first.returncode == 0, said
    before = {path.name: path.read_bytes() for path in (trainer.folder / "run").iterdir() if path.name != ".lock"}
    second = torchrun(trainer, *options, overrides=(*few, "--stages.1.lr", "1e-2"))
    said = second.communicate()[0]
    assert second.returncode == 1 and said.count("holds a run already") >= 2, said
    assert {path.name: path.read_bytes() for path in (trainer.folder / "run").iterdir() if path.name != ".lock"} == before


@pytest.mark.distributed
@pytest.mark.slow
def test_restart_on_one_of_two_agents_finds_the_run(trainer):
    """Agents count restarts apart: the rank of the second is killed, and the ranks of the first are started anew by neither."""
    port = 20000 + os.getpid() % 20000
    rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--rdzv_id", "two")
    nodes = ("--nnodes", "2", "--max-restarts", "1", *rendezvous)
    few = ("--stages.0.tokens", "8192")
    agents = [torchrun(trainer, *nodes, overrides=few) for _ in range(2)]
    wait_for(trainer.folder / "run/ckpt.pt", *agents)
    os.kill(children(agents[1])[0], signal.SIGKILL)
    said = [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "at 0 tokens" not in "".join(said) and "".join(said).count("from ") >= 2
    assert [record["step"] for record in records(trainer.folder / "run") if record["loss"]] == list(range(1, 32 + 12 + 1))


@pytest.mark.distributed
@pytest.mark.slow
def test_worker_that_was_told_to_stop_is_not_started_anew(trainer):
    """Nor where the ranks' store ends with each attempt, as hosts that come and go need it."""
    process = torchrun(trainer, "--standalone", "--max-restarts", "1", env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    wait_for(trainer.folder / "run/metrics.jsonl", process)
    time.sleep(1)
    os.kill(children(process)[0], signal.SIGTERM)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "exitcode  : 143" in said, said
    assert said.count("stopped by a signal after step") == 1 and said.count("note: a signal has stopped this run") == 1
    steps = [record["step"] for record in records(trainer.folder / "run")]
    assert steps == list(range(1, len(steps) + 1)) and f"after step {len(steps)};" in said


@pytest.mark.distributed
@pytest.mark.slow
def test_signal_to_torchrun_reaches_the_ranks_which_save(trainer):
    process = torchrun(trainer, "--standalone", "--max-restarts", "1")
    wait_for(trainer.folder / "run/metrics.jsonl", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "got signal: 15" in said and said.count("stopped by a signal after step") == 1, said
    assert (trainer.folder / "run/ckpt.pt").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_rank_that_hangs_is_told_by_the_other_and_torchrun_starts_both_anew(trainer):
    few = ("--stages.0.tokens", "8192", "--eval_interval", "99999", "--hang_timeout", "5")
    process = torchrun(trainer, "--standalone", "--max-restarts", "1", overrides=few, processes=2)
    wait_for(trainer.folder / "run/ckpt.pt", process)
    stuck = children(process)[1]
    os.kill(stuck, signal.SIGSTOP)
    lines = []
    while "hangs in: " not in (lines or [""])[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    time.sleep(8)
    os.kill(stuck, signal.SIGKILL)  # torchrun would, after 30 s
    said = process.stdout.read()
    assert process.wait() == 0, said
    assert re.match(r"error: rank 0 on .* hangs in: (train step|save|growth|evaluation); nothing has moved for", lines[-1])
    assert 'train.py", line' in said
    assert records(trainer.folder / "run") == records(trainer.good("whole", *few, processes=2))
