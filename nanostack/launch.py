"""What started this process: alone, or as one of the ranks that torchrun, srun or a script started together.

torchrun has an agent on every machine, which starts all ranks anew when one has died: a launch has several attempts. Agents
count restarts apart, and their store keeps what dead ranks wrote. So ranks find each other by greetings that no earlier attempt
can have answered, and a launch knows its run by a mark in the run's folder: it has the key of the launch, which only a claim
puts into the store, and the agents, which are left where the store is lost or ends with an attempt.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from nanostack.errors import UserError
from nanostack.files import replacing

KEY, MARK = "nanostack/launch", ".torchrun"  # in torchrun's store, and in the folder of the run
OTHERS = {"SLURM_PROCID": "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE", "PMI_RANK": "PMI_SIZE"}
HOW = "start ranks with torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (docs/slurm.sh)"


@dataclass
class Launch:
    """One attempt of the ranks of this process group, and what it shares with attempts before and after it."""

    store: dist.Store
    attempt: str = ""
    agents: list[str] = field(default_factory=list)  # on rank 0: of all ranks. Empty without torchrun
    folder: Path | None = field(default=None, init=False)  # of the run, once it has the mark

    def __post_init__(self):
        claimed = self.store.check([KEY])
        self.key = self.store.get(KEY).decode() if claimed else uuid.uuid4().hex

    def claimed(self, folder: Path) -> bool:
        """Whether an attempt of this launch left its mark in the folder of its run. Its key then is that of the launch."""
        found = self._found(folder)
        ours = found.get("key") == self.key or bool(set(found.get("agents", ())) & set(self.agents))
        if ours:
            self.key = found["key"]
        return ours

    def mark(self, folder: Path, stopped: int = 0) -> None:
        """Leave a claim that succeeds in the folder of the run. Later attempts know it from now on."""
        self.store.set(KEY, self.key)
        with replacing(folder / MARK) as file:
            json.dump({"key": self.key, "agents": self.agents, "stopped": stopped}, file)
        self.folder = folder

    def note_stop(self, code: int) -> None:
        """The run was stopped by a signal: the same agents shall not start it anew."""
        if self.folder is not None:
            with contextlib.suppress(OSError):  # of a full disk: torchrun then starts the run anew
                self.mark(self.folder, code)

    def stop_noted(self, folder: Path) -> int:
        """The exit code of an earlier attempt that a signal stopped, with the same agents; 0 where there is none.

        An agent also stops its ranks by a signal when a machine joins or leaves. The agents then are others: the run goes on,
        without the note, as the next agents may be those of the note again.
        """
        found = self._found(folder) if self.claimed(folder) else {}
        if found.get("stopped") and set(found["agents"]) != set(self.agents):
            with contextlib.suppress(OSError):  # the claim will tell it
                self.mark(folder)
            return 0
        return found.get("stopped", 0)

    def _found(self, folder: Path) -> dict:
        """The mark in a folder; empty where there is none that can be read."""
        try:
            found = json.loads((folder / MARK).read_bytes())
            return found if found.keys() >= {"key", "agents"} else {}
        except (OSError, ValueError, AttributeError):
            return {}


def check_environment() -> None:
    """Raise `UserError` where the variables that say which rank this is are missing, no numbers, or contradict each other."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        for place, size in OTHERS.items():
            alone = _number(size, 1) <= 1 or place not in os.environ
            in_batch_script = "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ and place == "SLURM_PROCID"
            if not alone and not (in_batch_script and _number(place, 0) == 0):
                raise UserError(f"{size} is {os.environ[size]}, but RANK is not set: every task would work alone; {HOW}")
        return
    if rank is None or world is None:
        there, missing = ("RANK", "WORLD_SIZE") if world is None else ("WORLD_SIZE", "RANK")
        raise UserError(f"{there} is set and {missing} is not: {HOW}, or unset {there}")
    if _number("WORLD_SIZE", 1) < 1 or not 0 <= _number("RANK", 0) < _number("WORLD_SIZE", 1):
        raise UserError(f"RANK {rank} is not one of WORLD_SIZE {world} ranks, which count from 0; {HOW}")
    _number("LOCAL_RANK", 0)
    if _number("WORLD_SIZE", 1) == 1:
        return
    missing_ones = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing_ones:
        raise UserError(f"WORLD_SIZE is {world}, but {' and '.join(missing_ones)} not set; {HOW}")
    if not 0 <= _number("LOCAL_RANK", 0) < _number("WORLD_SIZE", 1):
        raise UserError(f"LOCAL_RANK {os.environ['LOCAL_RANK']} cannot be, with WORLD_SIZE {world}; {HOW}")
    if not 0 < _number("MASTER_PORT", 1) < 2**16:
        raise UserError(f"MASTER_PORT {os.environ['MASTER_PORT']} is no port; {HOW}")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, which is no whole number; {HOW}") from None


def agent() -> str | None:
    """The torchrun that started this process, by a name that no other process ever has; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return ":".join((socket.gethostname(), boot(), str(os.getppid()), _started(os.getppid())))


def boot() -> str:
    """A name of this machine's kernel since it was started; its containers share it."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else socket.gethostname()


def _started(pid: int) -> str:
    """When a process began, as Linux counts; "" elsewhere."""
    path = Path(f"/proc/{pid}/stat")
    return path.read_text().rpartition(")")[2].split()[19] if path.exists() else ""


def connect(timeout: timedelta) -> Launch | None:
    """Meet the other ranks of this attempt. None for a process that is alone and was not started by torchrun."""
    check_environment()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    mine = agent()
    if world == 1 and (mine is None or not os.environ.get("MASTER_ADDR")):
        return None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', 'MASTER_PORT is not set')}"
        raise UserError(
            f"rank {rank} cannot meet the others at {where} (MASTER_ADDR, MASTER_PORT): {_first_line(error)}"
        ) from error
    attempt, agents = _greet(store, world, mine, timeout) if rank == 0 else (_be_greeted(store, rank, world, mine), [mine])
    return Launch(store, attempt, sorted({one for one in agents if one}))


def _greet(store: dist.Store, world: int, mine: str | None, timeout: timedelta) -> tuple[str, list[str | None]]:
    """Rank 0 answers every greeting, also of ranks that have died since, until all ranks have heard the answer."""
    attempt, agents, give_up = uuid.uuid4().hex, [mine], time.monotonic() + timeout.total_seconds()
    heard = f"nanostack/heard/{attempt}"
    while len(agents) < world:
        if store.queue_len("nanostack/greetings"):
            greeting = json.loads(store.queue_pop("nanostack/greetings"))
            right = greeting["world"] == world
            wrong = f"WORLD_SIZE is {greeting['world']} for rank {greeting['rank']} and {world} for rank 0"
            store.set(f"nanostack/answer/{greeting['nonce']}", json.dumps({"attempt": attempt} if right else {"error": wrong}))
        elif store.queue_len(heard):
            agents.append(json.loads(store.queue_pop(heard)))
        elif time.monotonic() > give_up:
            raise UserError(f"only {len(agents)} of {world} ranks have come within {timeout.total_seconds():.0f} s")
        else:
            time.sleep(0.01)
    return attempt, agents


def _be_greeted(store: dist.Store, rank: int, world: int, mine: str | None) -> str:
    """The name of the attempt, as a rank 0 that lives has just told it."""
    nonce = uuid.uuid4().hex
    store.queue_push("nanostack/greetings", json.dumps({"rank": rank, "world": world, "nonce": nonce}))
    answer = json.loads(store.get(f"nanostack/answer/{nonce}"))
    if "error" in answer:
        raise UserError(f"{answer['error']}; {HOW}")
    store.queue_push(f"nanostack/heard/{answer['attempt']}", json.dumps(mine))
    return answer["attempt"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
