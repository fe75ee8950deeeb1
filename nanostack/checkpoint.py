"""Checkpoints: one file that is always whole, and a reader that believes nothing.

`ckpt.pt` is written beside its place, synced and renamed; the one before it is `ckpt-<samples>.pt` from then on, a file of its
own, so that whatever a user copies over one of them leaves the others. A process killed at any moment leaves either the old
checkpoint or the new one. The file is one dict of tensors and plain values, read with `weights_only=True`; it carries a SHA-256
per tensor and one of all plain values.
"""

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager

from nanostack import files, kept, shard_reader, sharded, stop
from nanostack.config import Train
from nanostack.errors import UserError
from nanostack.growth import Receipt, ramp_left
from nanostack.model import LlamaConfig
from nanostack.optimizer import name_of
from nanostack.parallel import Placement, is_main_rank, on_rank_0, reshard, saving_group
from nanostack.state import Cursor, State
from nanostack.text.bounds import Bounds
from nanostack.text.manifest import load_manifest

FORMAT = "nanostack-checkpoint-1"


RETRY_SECONDS = 30.0  # after a save that failed, the next try while training goes on
PATIENCE_SECONDS = 10.0  # how long a run that ends goes on trying


def save(state: State, path: str | Path, manifest_sha256: str | None = None, keep: int = 2) -> None:
    """Write `state` as one file `path`; what was there gets a number. Of all only the last `keep` stay.

    Every rank must call it. Raises `UserError` where the file cannot be written; what was there before is intact then.
    """
    contents = pack(state, manifest_sha256)
    on_rank_0(_replace, contents, Path(path), keep)


def save_sharded(state: State, path: Path, manifest_sha256: str | None = None) -> None:
    """Write `state` as the folder NAME that `path`, which is NAME.pt, points to. All ranks must call it. UserError as above."""
    reshard(state.model)
    sharded.save(shards(state), sharded.Writer(path.with_suffix(""), _plain(state, manifest_sha256, as_json=True), path))


def part_writer(state: State, path: Path, manifest_sha256: str | None) -> sharded.PartWriter:
    """A writer for the parts of a sharded checkpoint `path`, whose plain values are those of `state`."""
    return sharded.PartWriter(path.with_suffix(""), _plain(state, manifest_sha256, as_json=True), path)


class Saver:
    """Saves a run's checkpoints while it trains on: the state is copied to the host, and threads hash and write the copy.

    Sharded, every rank copies and writes its own shards; else rank 0 gathers all, tensor by tensor, and writes one file. On a
    GPU copies go into pinned memory that is kept for the next save. One save is under way at a time. All ranks call it alike.

    A save that fails is said at once, and `wants_to_save` asks for another, of the state at hand by then. Leaving a `with`
    waits until the last one is on disk.
    """

    def __init__(self, path: Path, manifest_sha256: str | None, keep: int, in_shards: bool, say: Callable[[str], object]):
        self.path, self.manifest_sha256, self.keep, self.in_shards, self.say = path, manifest_sha256, keep, in_shards, say
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._state: State | None = None
        self._failed: tuple[float, str] | None = None  # when the last save failed, and how
        self._host: dict[str, Tensor] = {}
        self._stager: DefaultStager | None = None
        self._group = saving_group() if in_shards else None

    def save(self, state: State) -> None:
        """Copy the state as it is now, and have it written. Waits for the save before this one."""
        self._settle()
        self._failed, self._state = None, state
        self._writing = self._start_shards(state) if self.in_shards else self._start_file(state)
        if self._writing is not None:
            self._writing.add_done_callback(self._tell)

    @property
    def wants_to_save(self) -> bool:
        """Whether the last save failed a while ago, as this rank knows."""
        return self._failed is not None and time.monotonic() - self._failed[0] > RETRY_SECONDS

    def wait(self) -> None:
        """Wait until what was saved is on disk; tries again for a while. Raises `UserError` on every rank where it is not."""
        give_up, pause = time.monotonic() + PATIENCE_SECONDS, 1.0
        while True:
            self._settle()
            wrong = on_rank_0(lambda: self._failed and (self._failed[1], time.monotonic() > give_up))
            if wrong is None:
                return
            if wrong[1]:
                raise UserError(wrong[0])
            time.sleep(pause)
            pause *= 2
            assert self._state is not None
            self.save(self._state)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def _settle(self) -> None:
        """Wait for the save that is under way."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        if (error := writing.exception()) is None:
            self._failed = None
            return
        self._failed = self._failed or (time.monotonic(), self._why(error))  # `_tell` may be called only a moment later
        if is_main_rank():
            for partial in self.path.parent.glob(f"{self.path.stem}-*{sharded.PARTIAL}"):  # takes room, and is no checkpoint
                shutil.rmtree(partial, ignore_errors=True)

    def _why(self, error: BaseException) -> str:
        return str(error) if isinstance(error, UserError) else f"could not save {self.path}: {sharded.reason(error)}"

    def _tell(self, writing: Future) -> None:
        """Called by the thread that wrote."""
        if (error := writing.exception()) is None:
            return
        why = self._why(error)
        self._failed = time.monotonic(), why
        if not isinstance(error, UserError | CheckpointException | OSError):
            why += f" ({type(error).__name__})"
        if is_main_rank():
            self.say(f"warning: {why}; it will be tried again")

    def _start_shards(self, state: State) -> Future:
        reshard(state.model)
        if self._stager is None:
            self._stager = sharded.stager(state.placement.device)
        folder = self.path.with_name(f"{self.path.stem}-{state.cursor.samples}")
        plain = _plain(state, self.manifest_sha256, as_json=True)
        writer = sharded.Writer(folder, plain, self.path, self._point)
        return sharded.save_async(shards(state), writer, self._stager, self._group)

    def _point(self, folder: Path) -> None:
        """Called on rank 0 when a folder is whole: `path` points to it, and what is too old goes."""
        kept.give_number(self.path)
        former = sharded.pointed_to(self.path)
        sharded.point(self.path, folder)
        kept.number_former(self.path, former)
        kept.prune(self.path, self.keep)

    def _start_file(self, state: State) -> Future | None:
        contents = _contents(state, self.manifest_sha256, self._copy)
        copied = None
        if state.placement.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        return None if contents is None else self._pool.submit(self._write, contents, copied)

    def _write(self, contents: dict, copied: "torch.cuda.Event | None") -> None:
        if copied is not None:
            copied.synchronize()
        _replace(contents | {"hashes": _hashes(contents)}, self.path, self.keep)

    def _copy(self, name: str, value: Tensor) -> Tensor:
        host = self._host.get(name)
        if host is None or host.shape != value.shape or host.dtype != value.dtype:
            host = self._host[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return host.copy_(value, non_blocking=True)


def write(contents: dict | None, path: Path, name: Path | None = None) -> None:
    """Write one checkpoint file, unless another rank has its contents. UserError where it cannot be written; what was there
    before is intact then. `name` is the one by which the error calls it."""
    if contents is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path, "wb") as file, stop.held_back():
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        raise UserError(f"could not save {name or path}: {sharded.reason(error)}; earlier checkpoints are intact") from error


def load(path: str | Path) -> dict:
    """Read and verify a checkpoint. Tensors are memory-mapped from the file, on the host; those of a sharded one are read, and
    verified, when they are asked for.

    Returns a dict: format, config, model, optimizer, cursor, rng, growth, manifest_sha256, seed, bounds, versions,
    hashes, and window where there is one. Raises `UserError` for a file that is missing, foreign, truncated or altered, or by
    a later nanostack that says more.
    """
    path = kept.found(Path(path))
    folder = sharded.folder_of(path)
    saved = _read(path) if folder is None else shard_reader.load(folder)
    try:
        LlamaConfig(**saved["config"]), Cursor(**saved["cursor"]), Bounds(**saved["bounds"])
        for receipt in saved["growth"]:
            Receipt.of(receipt)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not what this nanostack writes; a later one may have written it ({error})") from error
    return saved


def _read(path: Path) -> dict:
    """What `load` gives, of one file."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        ours = isinstance(saved, dict) and saved.get("format") == FORMAT
    except Exception as error:  # a damaged zip or pickle fails in many ways
        raise UserError(f"{path} is damaged or not a nanostack checkpoint ({type(error).__name__})") from error
    if not ours:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f"{path} is not a nanostack checkpoint of format {FORMAT} (found {found!r})")
    try:
        _verify(saved, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from error
    # Before checkpoints said it, nothing was put before the texts of a run; what others put there is their tokenizer's affair.
    saved.setdefault("bounds", vars(Bounds(start=None if saved["manifest_sha256"] is None else [])))
    return saved


def begin(config: Train, source: str | None, resuming: bool, manifest_sha256: str, placement: Placement) -> State:
    """The state that a run begins with: that of the checkpoint `source`, if any, on the run's first stage unless `resuming`.

    manifest_sha256 is that of the text at hand. UserError for a checkpoint that the config cannot go on from.
    """
    data = Bounds.of_data(load_manifest(config.data.path))
    if source is None:
        state = State.create(config.model, config.optim, placement, config.seed)
        state.bounds = data
        return state
    saved = load(source)
    check_fits(saved, source, config, manifest_sha256 if resuming else None)
    if (kept := name_of(saved["optimizer"])) not in (None, config.optim.name):
        saved["optimizer"] = {}
        if is_main_rank():
            print(f"note: {source} has the state of {kept}; {config.optim.name} begins anew", file=sys.stderr)
    state = State.restore(saved, config.optim, placement)
    state.seed = config.seed
    if (difference := state.bounds.unlike(data)) and is_main_rank():
        print(f"note: {source} and {config.data.path}: {difference}", file=sys.stderr)
    state.bounds = state.bounds.trained_on(data)
    if not resuming:
        state.cursor.stage = state.cursor.stage_tokens = 0
    return state


def check_fits(saved: dict, source: str | Path, config: Train, resuming_on: str | None) -> None:
    """Raise `UserError` unless the config can go on from a checkpoint.

    To start from one, its model must have the config's shape. To resume, `resuming_on` is the SHA-256 of the manifest at hand:
    going on exactly needs the same text in the same order, and the shape that the model has in the checkpoint's stage.
    """
    model = config.model
    if resuming_on is None:
        _check_growths(saved, source, config)
    else:
        stage = saved["cursor"]["stage"]
        if stage >= len(config.stages):
            raise UserError(f"{source} is in stage {stage}, but the config has only stages 0 to {len(config.stages) - 1}")
        if saved["manifest_sha256"] != resuming_on:
            raise UserError(f"{source} was trained on other data than {config.data.path} holds now (their manifests differ)")
        if saved["seed"] != config.seed:
            raise UserError(f"{source} was trained with seed {saved['seed']}, not {config.seed}: other text would come next")
        if (kept := name_of(saved["optimizer"])) not in (None, config.optim.name):
            raise UserError(
                f"{source} has the optimizer state of {kept}, which {config.optim.name} cannot go on from: resume with "
                f"--optim.name {kept}, or begin another run from it (--init_from)"
            )
        model = config.shapes()[stage]
    there, wanted = dataclasses.asdict(LlamaConfig(**saved["config"])), dataclasses.asdict(model)
    differ = [f"model.{k} is {there[k]} there, {v} here" for k, v in wanted.items() if there[k] != v]
    if differ:
        raise UserError(f"checkpoint {source} does not fit the config: {'; '.join(differ)}")


def _check_growths(saved: dict, source: str | Path, config: Train) -> None:
    """Raise `UserError` for a stage that asks for what the growths of the checkpoint do not allow."""
    first = next((n for n, stage in enumerate(config.stages) if stage.growth), len(config.stages))
    left, until = ramp_left(saved["growth"], saved["cursor"]["tokens"]), sum(stage.tokens for stage in config.stages[:first])
    if first < len(config.stages) and left > until:
        raise UserError(f"{source} is still ramping in its last growth, for {left} tokens; stage {first} grows after {until}")
    new_layers = saved["growth"] and Receipt.of(saved["growth"][-1]).new_layers
    if not new_layers and any(stage.freeze for stage in config.stages[:first]):
        raise UserError(f"freeze trains new layers only, and {source} has none: no growth made any")


def pack(state: State, manifest_sha256: str | None) -> dict | None:
    """The dict that a checkpoint is, on the host; every rank must call it, rank 0 gets it."""
    contents = _contents(state, manifest_sha256, lambda name, value: value.cpu())
    return contents and contents | {"hashes": _hashes(contents)}


def _contents(state: State, manifest_sha256: str | None, to_host: Callable[[str, Tensor], Tensor]) -> dict | None:
    """The dict of `pack` without its hashes. `to_host(name, tensor)` brings a tensor to the host."""
    model, optimizer = state.whole_tensors(to_host if is_main_rank() else None)
    if not is_main_rank():
        return None
    return _plain(state, manifest_sha256) | {"format": FORMAT, "model": model, "optimizer": optimizer}


def _plain(state: State, manifest_sha256: str | None, as_json: bool = False) -> dict:
    """All that a checkpoint holds beside weights and the optimizer's state."""
    rng = {"cpu": torch.get_rng_state()}
    if state.placement.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(state.placement.device)
    return {
        "config": dataclasses.asdict(state.model.config),
        "cursor": dataclasses.asdict(state.cursor),
        "rng": sharded.encoded(rng) if as_json else rng,
        "growth": [copy.deepcopy(receipt.as_dict()) for receipt in state.growth],
        "manifest_sha256": manifest_sha256,
        "seed": state.seed,
        "bounds": dataclasses.asdict(state.bounds),
        **({} if state.window is None else {"window": state.window}),
        "versions": {"torch": torch.__version__.split("+")[0], "numpy": numpy.__version__},
    }


def shards(state: State) -> dict[str, Tensor]:
    """This rank's shards of weights and of the optimizer's state, by the names that they have in a sharded checkpoint."""
    named = dict(state.model.named_parameters())
    kept = {name: state.optimizer.state.get(parameter, {}) for name, parameter in named.items()}
    return sharded.tensors_of({name: parameter.detach() for name, parameter in named.items()}, kept)


def _replace(contents: dict, path: Path, keep: int) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(contents, new, path)
    try:
        kept.put_in_place(new, path, contents["cursor"]["samples"])
    except OSError as error:
        raise UserError(f"could not put {new} in place of {path}: {sharded.reason(error)}") from error
    kept.prune(path, keep)


def all_tensors(contents: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by the names under which their hashes stand."""
    tensors = {f"model.{name}": tensor for name, tensor in contents["model"].items()}
    for name, state in contents["optimizer"].items():
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    return tensors | {f"rng.{name}": tensor for name, tensor in contents["rng"].items()}


def _hashes(contents: dict) -> dict[str, str]:
    tensors = all_tensors(contents)
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(tensors, pool.map(sharded.tensor_sha256, tensors.values()), strict=True))
    return with_plain(hashes, contents)


def with_plain(hashes: dict[str, str], contents: dict) -> dict[str, str]:
    """The hashes of all tensors, and under "" that of all plain values."""
    plain = {k: v for k, v in contents.items() if k not in ("model", "optimizer", "rng", "hashes")}
    return hashes | {"": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _verify(saved: dict, path: Path) -> None:
    actual, recorded = _hashes(saved), saved["hashes"]
    if actual != recorded:
        wrong = [
            name or "its plain values"
            for name in sorted(actual.keys() | recorded.keys())
            if actual.get(name) != recorded.get(name)
        ]
        raise UserError(f"{path} is damaged: {wrong[0]} is not what was saved; use an earlier checkpoint of the run")
