"""A checkpoint is whole or not there, and what is not exactly what was saved is refused."""

import resource
import signal
import time
import zipfile

import pytest
import torch
from conftest import ROOT, assert_same_state, start_python

from nanostack import checkpoint, kept, sharded
from nanostack.config import Data, Growth, Optim, Stage, Train
from nanostack.errors import UserError
from nanostack.model import LlamaConfig
from nanostack.optimizer import guarded_step
from nanostack.parallel import Placement
from nanostack.state import State

CONFIG = LlamaConfig(n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=24, vocab_size=32, seq_len=8)
CPU = Placement(torch.device("cpu"))


def trained(steps: int = 2) -> State:
    state = State.create(CONFIG, Optim(), CPU, seed=0)
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        loss = state.model(tokens, tokens.roll(-1, 1))
        loss.backward()
        guarded_step(state.optimizer, loss.detach(), 1e-2, 1.0)
        state.cursor.advance(2, CONFIG)
    return state


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(trained(), tmp_path / "ckpt.pt", "manifest")
    return tmp_path / "ckpt.pt"


def test_restored_state_is_the_saved_one_bit_for_bit(saved):
    state = State.restore(checkpoint.load(saved), Optim(), CPU)
    again = saved.with_name("again.pt")
    checkpoint.save(state, again, "manifest")
    assert_same_state(checkpoint.load(saved), checkpoint.load(again))
    original = trained()
    for a, b in zip(original.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in original.optimizer.state[a].items():
            assert torch.equal(value, state.optimizer.state[b][key])
    assert torch.equal(original.model.cos, state.model.cos)


def test_file_holds_what_the_design_lists(saved):
    contents = torch.load(saved, weights_only=True)
    assert contents.keys() >= {
        "format", "config", "model", "optimizer", "cursor", "rng", "growth", "manifest_sha256", "versions", "hashes",
    }  # fmt: skip
    assert contents["cursor"].keys() >= {"samples", "tokens", "flops", "flops_exact", "stage"}
    assert contents["optimizer"]["blocks.0.attn.qkv.weight"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    tensors = [*contents["model"].values(), *(v for s in contents["optimizer"].values() for v in s.values())]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_tied_embeddings_survive(tmp_path):
    from dataclasses import replace

    state = State.create(replace(CONFIG, tie_embeddings=True), Optim(), CPU, seed=0)
    checkpoint.save(state, tmp_path / "ckpt.pt")
    back = State.restore(checkpoint.load(tmp_path / "ckpt.pt"), Optim(), CPU)
    assert back.model.head.weight is back.model.embed.weight
    assert torch.equal(back.model.embed.weight, state.model.embed.weight)


def test_every_flipped_byte_of_content_is_found(saved, tmp_path):
    """One byte in every record of the file, and one in every record's raw place of the central directory."""
    raw = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        places = []
        for entry in archive.infolist():
            start = raw.index(entry.filename.encode(), entry.header_offset) + len(entry.filename)
            start += int.from_bytes(raw[entry.header_offset + 28 : entry.header_offset + 30], "little")
            places += [start + entry.file_size // 2] if entry.file_size and "data" in entry.filename else []
    with zipfile.ZipFile(saved) as archive:
        pickle = archive.getinfo("ckpt-4/data.pkl" if "ckpt-4/data.pkl" in archive.namelist() else "archive/data.pkl")
        start = raw.index(pickle.filename.encode(), pickle.header_offset) + len(pickle.filename)
        places += range(start, start + pickle.file_size, 97)
    assert len(places) > 50
    damaged = tmp_path / "damaged.pt"
    found, intact = 0, checkpoint.load(saved)
    for place in places:
        damaged.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        try:
            loaded = checkpoint.load(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            found += 1
        else:  # a byte that means nothing: what was loaded must be what was saved
            assert_same_state(loaded, intact)
    assert found > 0.8 * len(places)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_truncated_file_is_refused(saved, keep):
    raw = saved.read_bytes()
    saved.write_bytes(raw[: int(len(raw) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="damaged or not a nanostack checkpoint"):
        checkpoint.load(saved)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(ValueError, match="there is no checkpoint"):
        checkpoint.load(path)
    path.write_text("not a checkpoint at all")
    with pytest.raises(ValueError, match="not a nanostack checkpoint"):
        checkpoint.load(path)
    torch.save({"model": {"weight": torch.zeros(3)}}, path)
    with pytest.raises(ValueError, match="not a nanostack checkpoint of format"):
        checkpoint.load(path)
    torch.save(torch.nn.Linear(2, 2), path)  # code in a pickle is never run
    with pytest.raises(ValueError, match="not a nanostack checkpoint"):
        checkpoint.load(path)


def test_changed_tensor_is_named(saved):
    contents = torch.load(saved, weights_only=True)
    contents["model"]["blocks.1.mlp.down.weight"][3, 4] += 1e-3
    torch.save(contents, saved)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.down\.weight is not what was saved"):
        checkpoint.load(saved)


def test_changed_plain_value_is_found(saved):
    contents = torch.load(saved, weights_only=True)
    contents["cursor"]["tokens"] += 1
    torch.save(contents, saved)
    with pytest.raises(ValueError, match="plain values"):
        checkpoint.load(saved)


@pytest.mark.parametrize("part", ["config", "cursor", "bounds", "growth"])
@pytest.mark.parametrize("in_shards", [False, True])
def test_what_a_later_nanostack_wrote_is_refused(part, in_shards, tmp_path, monkeypatch):
    """Whole, with hashes that fit, and a value more than this version knows."""
    as_now = checkpoint._plain

    def as_later(*arguments, **named):
        plain = as_now(*arguments, **named)
        more = {"invented_later": 1}
        return plain | {part: [more] if part == "growth" else plain[part] | more}

    monkeypatch.setattr(checkpoint, "_plain", as_later)
    path = tmp_path / "ckpt.pt"
    (checkpoint.save_sharded if in_shards else checkpoint.save)(trained(1), path)
    with pytest.raises(UserError, match=r"ckpt\.pt is not what this nanostack writes.*invented_later"):
        checkpoint.load(path)


def test_full_disk_is_told_and_the_previous_checkpoint_survives(saved):
    before = saved.read_bytes()
    state = trained(steps=3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing past the limit is an error then, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"could not save .*ckpt\.pt: .*; earlier checkpoints are intact"):
            checkpoint.save(state, saved, "manifest")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["ckpt.pt"]
    checkpoint.save(state, saved, "manifest")
    assert checkpoint.load(saved)["cursor"]["samples"] == 6


def test_killed_while_saving_again_and_again_ckpt_is_always_whole(tmp_path):
    """A process that does nothing but save is killed at many moments; what is at ckpt.pt must load every time."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "tests/trainer")!r}]
from test_checkpoint import trained
from nanostack import checkpoint, kept
state = trained(1)
checkpoint.save(state, {str(tmp_path / "ckpt.pt")!r}, "manifest")
while True:
    state.cursor.samples += 1
    checkpoint.save(state, {str(tmp_path / "ckpt.pt")!r}, "manifest")
"""
    seen = []
    for attempt in range(6):
        (tmp_path / "ckpt.pt").unlink(missing_ok=True)
        process = start_python("-c", code)
        while not (tmp_path / "ckpt.pt").exists():
            assert process.poll() is None, process.done().stderr
        time.sleep(0.05 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(checkpoint.load(tmp_path / "ckpt.pt")["cursor"]["samples"])
    assert len(set(seen)) > 1, "it was always killed at the same place"
    assert len(kept.numbered_checkpoints(tmp_path / "ckpt.pt")) <= 3


class Interrupts:
    def __reduce__(self):
        signal.raise_signal(signal.SIGINT)
        return tuple, ()


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C: a run of a test before this one may have left another."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_interrupt_in_the_midst_of_a_write_is_one_and_no_failed_save(saved, tmp_path, monkeypatch):
    """Within torch.save, and within DCP, which takes all that is raised in it for failures of a rank."""
    before = saved.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write({"what": Interrupts()}, saved)
    assert saved.read_bytes() == before and list(tmp_path.iterdir()) == [saved]
    wrote = sharded.Writer.write_data
    monkeypatch.setattr(sharded.Writer, "write_data", lambda *a: (signal.raise_signal(signal.SIGINT), wrote(*a))[1])
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_sharded(trained(), tmp_path / "other.pt")
    assert checkpoint.load(tmp_path / "other.pt") and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_folder_without_permission_or_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not save"):
        checkpoint.save(trained(1), tmp_path / "file" / "ckpt.pt", "manifest")


def test_run_with_fewer_stages_cannot_resume(saved):
    contents = checkpoint.load(saved)
    contents["cursor"]["stage"] = 2
    config = Train(Data("data"), CONFIG, (Stage(64, 1e-2), Stage(64, 1e-2)), 16, 2, "out")
    with pytest.raises(ValueError, match=r"is in stage 2, but the config has only stages 0 to 1"):
        checkpoint.check_fits(contents, saved, config, "manifest")


def test_growth_receipts_travel_with_the_state(tmp_path):
    state = trained()
    receipt = state.grow(Growth("stack", 3))
    checkpoint.save(state, tmp_path / "ckpt.pt", "manifest")
    back = State.restore(checkpoint.load(tmp_path / "ckpt.pt"), Optim(), CPU)
    assert back.growth == [receipt] and back.model.config.n_layer == 6
