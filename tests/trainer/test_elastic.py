"""Two hosts, one of which is cut off in the middle of a run, twice, and comes back: torchrun in two network namespaces."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY, records, start_python

# A run, slow while that file is there, that notes which samples each process has in each step, beside the number of ranks.
NOTES = """
import json, os, sys, time, torch, train
from nanostack import parallel
from nanostack.config import load
to, slow, *options = sys.argv[1:]
run = train.Run(load(options[0], options[1:]))
to = f"{to}.{os.getpid()}.{parallel.world_size()}"
def note(_, inputs):
    if torch.is_grad_enabled():
        time.sleep(0.1 * os.path.exists(slow))
        with open(to, "a") as file:
            print(json.dumps([run.recorder.step + 1, inputs[0].tolist()]), file=file)
run.state.model.register_forward_pre_hook(note)
run.train()
parallel.leave(run.stop.exit_code, run.placement.launch)
"""
STEPS = 300


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """The names of two namespaces with one cable between them: 10.77.0.1 and 10.77.0.2, each at its eth0."""
    names = [f"nanostack-{os.getpid()}-{letter}" for letter in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs iproute2, and root to make network namespaces: {error}")
    yield names
    for name in names:
        kill_all(name)
        ip("netns", "del", name)


def kill_all(name: str) -> None:
    """Kill all processes of a host."""
    for pid in subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def torchrun(host: int, name: str, *script: object) -> subprocess.Popen:
    """Start the torchrun of a host, the first of which holds the rendezvous: one host is enough, and two are welcome.

    A host that is not heard of for 6 s is done without; torchrun's own 15 s would make the test longer.
    """
    command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname $0; exec "$@"', f"host-{host}"]
    command += [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1:2",
        "--nproc_per_node",
        "1",
        "--max-restarts",
        "9",
    ]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29400", "--local_addr", f"10.77.0.{host + 1}"]
    command += ["--rdzv_conf", f"is_host={int(host == 0)},last_call_timeout=1,keep_alive_interval=2"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as docs/runs.md says
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *map(str, script)], cwd=ROOT, env=environment, **pipes)


def seen(folder, name: str) -> dict[int, set]:
    """Which samples each step has had, in whatever attempt."""
    found = collections.defaultdict(set)
    for path in folder.glob(f"{name}.samples.*"):
        for step, rows in map(json.loads, path.read_text().splitlines()):
            found[step] |= set(map(tuple, rows))
    return found


@pytest.mark.distributed
@pytest.mark.slow
def test_host_that_is_cut_off_is_done_without_and_taken_back(hosts, corpus, tmp_path):
    """What is left goes on from the last checkpoint, and with both when it is back: with its torchrun, or with a new one."""
    script = tmp_path / "notes.py"
    script.write_text(NOTES)
    tokens = str(STEPS // 2 * 256)
    options = [TINY, "--data.path", corpus, "--stages.0.tokens", tokens, "--stages.1.tokens", tokens, "--hang_timeout", "3"]
    options += ["--stages.0.lr", "1e-3", "--stages.1.lr", "1e-3", "--save_interval", "2560", "--eval_interval", "25600"]

    slow = tmp_path / "slow"
    slow.touch()

    def words(name: str) -> list[object]:
        return [script, tmp_path / f"{name}.samples", slow, *options, "--out", tmp_path / name]

    def ranks_of_last_attempt() -> tuple[int, int]:
        """How many ranks the latest attempt has, and its latest step; (0, 0) before the first."""
        paths = sorted(tmp_path.glob("run.samples.*"), key=lambda path: path.stat().st_mtime_ns)
        lines = paths[-1].read_text().splitlines() if paths else []
        return (int(paths[-1].suffix[1:]), json.loads(lines[-1])[0]) if lines else (0, 0)

    agents = [torchrun(host, name, *words("run")) for host, name in enumerate(hosts)]

    def wait_for(number: int, steps: int) -> None:
        """Until so many ranks have made so many steps."""
        first, ended = None, time.monotonic() + 120
        while True:
            ranks, step = ranks_of_last_attempt()
            first = (first or step) if ranks == number else None
            if first is not None and step >= first + steps:
                return
            assert time.monotonic() < ended and all(agent.poll() is None for agent in agents), "".join(map(end, agents))
            time.sleep(0.1)

    def end(agent: subprocess.Popen) -> str:
        agent.kill()
        return agent.communicate()[0]

    def cable(state: str) -> None:
        ip("-n", hosts[1], "link", "set", "eth0", state)

    wait_for(2, 12)
    cable("down")
    wait_for(1, 12)
    cable("up")
    wait_for(2, 12)
    cable("down")
    wait_for(1, 12)
    kill_all(hosts[1])
    said = [agents[1].communicate()[0]]
    cable("up")
    agents[1] = torchrun(1, hosts[1], *words("run"))
    wait_for(2, 12)
    slow.unlink()
    said += [agent.communicate(timeout=200)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "".join(said)
    assert all("hangs in: " in one for one in said[:2]), "".join(said)

    done = start_python(*words("whole")).done()
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path, "run") == seen(tmp_path, "whole") and len(seen(tmp_path, "whole")) == STEPS
    for ours, whole in zip(records(tmp_path / "run"), records(tmp_path / "whole"), strict=True):
        assert ours["step"] == whole["step"] and ours["loss"] == (whole["loss"] and pytest.approx(whole["loss"], rel=1e-5))
