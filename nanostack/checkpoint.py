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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy
import torch
from torch import Tensor

from nanostack import files
from nanostack.config import Train
from nanostack.errors import UserError
from nanostack.growth import Receipt, ramp_left
from nanostack.model import LlamaConfig
from nanostack.optimizer import name_of
from nanostack.parallel import Placement, is_main_rank, on_rank_0
from nanostack.state import State
from nanostack.text.bounds import Bounds
from nanostack.text.manifest import load_manifest

FORMAT = "nanostack-checkpoint-1"


def save(state: State, path: str | Path, manifest_sha256: str | None = None, keep: int = 2) -> None:
    """Write `state` as `path`; what was there gets a number. Of all only the last `keep` stay.

    Every rank must call it. Raises `UserError` where the file cannot be written; what was there before is intact then.
    """
    contents = pack(state, manifest_sha256)
    on_rank_0(_replace, contents, Path(path), keep)


class Saver:
    """Saves a run's checkpoints while it trains on: the state is copied, a thread hashes the copy and writes it.

    On a GPU the copies are asynchronous, into pinned memory that is kept for the next save; training waits for them on the
    device only. One save is under way at a time. All ranks must call it alike. An error of the writer is raised by the next
    `save` or `wait`; leaving a `with` waits too.
    """

    def __init__(self, path: str | Path, manifest_sha256: str | None, keep: int):
        self.path, self.manifest_sha256, self.keep = Path(path), manifest_sha256, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._host: dict[str, Tensor] = {}

    def save(self, state: State) -> None:
        """Copy the state as it is now, and have it written. Waits for the save before this one."""
        self.wait()
        contents = _contents(state, self.manifest_sha256, self._copy)
        copied = None
        if state.placement.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        if contents is not None:
            self._writing = self._pool.submit(self._write, contents, copied)

    def wait(self) -> None:
        """Wait until what was saved is on disk. Raises `UserError` on every rank where it could not be written."""
        on_rank_0(self._result)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def _result(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

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
        with files.replacing(path, "wb") as file:
            torch.save(contents, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        raise UserError(f"could not save {name or path}: {_reason(error)}; earlier checkpoints are intact") from error


def load(path: str | Path) -> dict:
    """Read and verify a checkpoint. Tensors are memory-mapped from the file, on the host.

    Returns a dict: format, config, model, optimizer, cursor, rng, growth, manifest_sha256, seed, bounds, versions,
    hashes. Raises `UserError` for a file that is missing, foreign, truncated or altered.
    """
    path = Path(path)
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
    rng = {"cpu": torch.get_rng_state()}
    if state.placement.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(state.placement.device)
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(state.model.config),
        "model": model,
        "optimizer": optimizer,
        "cursor": dataclasses.asdict(state.cursor),
        "rng": rng,
        "growth": [copy.deepcopy(receipt.as_dict()) for receipt in state.growth],
        "manifest_sha256": manifest_sha256,
        "seed": state.seed,
        "bounds": dataclasses.asdict(state.bounds),
        "versions": {"torch": torch.__version__.split("+")[0], "numpy": numpy.__version__},
    }


def _replace(contents: dict, path: Path, keep: int) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    write(contents, new, path)
    try:
        _put_in_place(new, path, contents["cursor"]["samples"])
    except OSError as error:
        raise UserError(f"could not put {new} in place of {path}: {_reason(error)}") from error
    numbered = numbered_checkpoints(path)
    for old in numbered[: max(0, len(numbered) - (keep - 1))]:
        old.unlink(missing_ok=True)


def go_back(source: Path, path: Path) -> None:
    """Make `path` a copy of the earlier checkpoint `source`; what was there gets a number."""
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(source, "rb") as earlier, files.replacing(new, "wb") as copy:
        shutil.copyfileobj(earlier, copy)
    _put_in_place(new, path, samples_of(new))


def _put_in_place(new: Path, path: Path, new_samples: int | None) -> None:
    """Rename `new` to `path`, and give the checkpoint that was there the name with its number. One of them is always there."""
    samples = samples_of(path)
    if samples is not None and samples != new_samples:
        numbered = path.with_name(f"{path.stem}-{samples}{path.suffix}")
        numbered.unlink(missing_ok=True)
        try:
            os.link(path, numbered)  # for a moment: the renaming below ends it
        except OSError:  # a file system without hard links
            os.replace(path, numbered)
    os.replace(new, path)
    files.sync(path.parent)


def samples_of(path: Path) -> int | None:
    """The samples that a checkpoint has seen, its tensors unread; None where it is none."""
    try:
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["cursor"]["samples"])
    except Exception:  # a damaged zip or pickle fails in many ways
        return None


def numbered_checkpoints(path: Path) -> list[Path]:
    """The files `ckpt-<samples>.pt` beside `ckpt.pt`, in the order of their numbers: those of clocks can be wrong."""
    pattern = f"{path.stem}-"
    found = [file for file in path.parent.glob(f"{pattern}*{path.suffix}") if file.stem[len(pattern) :].isdigit()]
    return sorted(found, key=lambda file: int(file.stem[len(pattern) :]))


def _tensors(contents: dict) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor for name, tensor in contents["model"].items()}
    for name, state in contents["optimizer"].items():
        tensors |= {f"optimizer.{name}.{key}": tensor for key, tensor in state.items()}
    return tensors | {f"rng.{name}": tensor for name, tensor in contents["rng"].items()}


def _hashes(contents: dict) -> dict[str, str]:
    """SHA-256 of every tensor's bytes, dtype and shape, and under "" that of all plain values."""
    tensors = _tensors(contents)
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(tensors, pool.map(_tensor_sha256, tensors.values()), strict=True))
    plain = {k: v for k, v in contents.items() if k not in ("model", "optimizer", "rng", "hashes")}
    return hashes | {"": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def _tensor_sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _verify(saved: dict, path: Path) -> None:
    actual, recorded = _hashes(saved), saved["hashes"]
    if actual != recorded:
        wrong = [
            name or "its plain values"
            for name in sorted(actual.keys() | recorded.keys())
            if actual.get(name) != recorded.get(name)
        ]
        raise UserError(f"{path} is damaged: {wrong[0]} is not what was saved; use an earlier checkpoint of the run")


def _reason(error: Exception) -> str:
    cause = error if isinstance(error, OSError) else error.__context__
    return cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).splitlines()[0]
