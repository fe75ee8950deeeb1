"""A sharded checkpoint is whole or not there; any number of ranks reads it; what is not what was saved is refused."""

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import Trainer, assert_same_state, python, ranks
from test_checkpoint import CONFIG, CPU, trained

from nanostack import checkpoint, sharded
from nanostack.config import Optim
from nanostack.errors import UserError
from nanostack.state import State


@pytest.fixture(scope="module")
def trainer_of_module(corpus, tmp_path_factory):
    return Trainer(corpus, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def by_two(trainer_of_module):
    """A run of two ranks, which saves shards unless told otherwise."""
    return trainer_of_module.good("two", "--keep", "9", processes=2)


@pytest.fixture
def saved(tmp_path):
    state = trained()
    checkpoint.save_sharded(state, tmp_path / "ckpt.pt", "manifest")
    return tmp_path / "ckpt.pt"


def read_all(path) -> dict:
    """What a checkpoint holds, every tensor of it read; hashes are those of whole tensors."""
    found = checkpoint.load(path)
    found |= {"model": dict(found["model"]), "optimizer": {name: dict(kept) for name, kept in found["optimizer"].items()}}
    return found | {"hashes": {name: sharded.tensor_sha256(one) for name, one in checkpoint.all_tensors(found).items()}}


def test_holds_what_one_file_holds_bit_for_bit(saved):
    checkpoint.save(trained(), saved.with_name("file.pt"), "manifest")
    file, folder = checkpoint.load(saved.with_name("file.pt")), read_all(saved)
    assert_same_state(folder, file)
    for name in ("config", "cursor", "growth", "manifest_sha256", "seed", "bounds", "versions"):
        assert folder[name] == file[name]
    assert torch.equal(folder["rng"]["cpu"], file["rng"]["cpu"])
    restored = State.restore(checkpoint.load(saved), Optim(), CPU)
    assert all(torch.equal(a, b) for a, b in zip(restored.model.parameters(), trained().model.parameters(), strict=True))


def test_torch_itself_reads_the_folder(saved):
    tensors = {"model.norm.weight": torch.zeros(CONFIG.d_model)}
    dcp.load(tensors, checkpoint_id=saved.with_name("ckpt"))
    assert torch.equal(tensors["model.norm.weight"], trained().model.norm.weight)


def test_every_flipped_byte_of_content_is_found_and_its_place_named(saved):
    intact, folder = read_all(saved), saved.with_name("ckpt")
    found = tried = 0
    for file in sorted(folder.iterdir()):
        raw = file.read_bytes()
        for place in range(5, len(raw), max(1, len(raw) // 60)):
            file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            tried += 1
            try:
                assert_same_state(read_all(saved), intact)  # a byte that means nothing
            except ValueError as error:
                assert str(folder) in str(error) and "\n" not in str(error)
                found += 1
        file.write_bytes(raw)
    assert tried > 150 and found > 0.5 * tried
    assert_same_state(read_all(saved), intact)


def test_changed_weight_is_named_with_its_file(saved):
    """The shard of another checkpoint, whole in itself."""
    other = saved.with_name("other.pt")
    checkpoint.save_sharded(trained(3), other, "manifest")
    shutil.copy(other.with_name("other") / "__0_0.distcp", saved.with_name("ckpt"))
    message = r"__0_0\.distcp is damaged, or of another checkpoint: \S+, the shard at \[0(, 0)?\] is not what was saved"
    with pytest.raises(ValueError, match=message):
        State.restore(checkpoint.load(saved), Optim(), CPU)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"ckpt lacks __0_0\.distcp, the shards of one rank"),
        (lambda folder: os.truncate(folder / "__0_0.distcp", 900), r"__0_0\.distcp is cut off: it has 900 bytes"),
        (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing"),
        (lambda folder: (folder / "nanostack.json").unlink(), r"nanostack\.json is missing or damaged \(No such file"),
        (lambda folder: (folder / "nanostack.json").write_text("{}"), r"nanostack\.json is missing or damaged"),
        (shutil.rmtree, r"ckpt\.pt points to .*ckpt, which is not there"),
    ],
)
def test_incomplete_folder_is_refused(saved, spoil, message):
    spoil(saved.with_name("ckpt"))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(saved)


def test_code_in_a_table_is_never_run(saved, tmp_path):
    """A table is a pickle, and a folder may come from anywhere: hashes that fit prove nothing."""
    mark, folder = tmp_path / "ran", saved.with_name("ckpt")

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    (folder / ".metadata").write_bytes(pickle.dumps(Code()))
    plain = json.loads((folder / "nanostack.json").read_text())
    plain["table_sha256"] = sharded.hashlib.sha256((folder / ".metadata").read_bytes()).hexdigest()
    plain.pop("sha256")
    (folder / "nanostack.json").write_text(json.dumps(plain | {"sha256": sharded.plain_sha256(plain)}))
    with pytest.raises(ValueError, match="no table of a checkpoint"):
        checkpoint.load(saved)
    assert not mark.exists()


def test_tensor_that_its_shards_do_not_make_whole_is_refused(saved):
    """A table that lacks one, whatever its hash says: what was not read would be what lay in memory."""
    folder = saved.with_name("ckpt")
    table = pickle.loads((folder / ".metadata").read_bytes())
    table.state_dict_metadata["model.embed.weight"].chunks.pop()
    raw = pickle.dumps(table)
    (folder / ".metadata").write_bytes(raw)
    plain = json.loads((folder / "nanostack.json").read_text()) | {"table_sha256": hashlib.sha256(raw).hexdigest()}
    plain |= {"sha256": sharded.plain_sha256({key: value for key, value in plain.items() if key != "sha256"})}
    (folder / "nanostack.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match=r"does not hold all of model\.embed\.weight"):
        checkpoint.load(saved)


@pytest.mark.parametrize("name", ["..", "x" * 300])
def test_pointer_to_what_is_no_name_is_one_line(saved, name):
    saved.write_text(json.dumps({"format": "nanostack-pointer-1", "folder": name}))
    with pytest.raises(UserError, match="names no folder beside it"):
        checkpoint.load(saved)


@pytest.mark.parametrize("content", ["[]", "[" * 4000])
def test_what_is_no_pointer_and_no_plain_values_is_one_line(saved, content):
    saved.with_name("ckpt").joinpath("nanostack.json").write_text(content)
    with pytest.raises(UserError, match="missing or damaged"):
        checkpoint.load(saved)
    saved.write_text(content)
    with pytest.raises(UserError, match="damaged or not a nanostack checkpoint"):
        checkpoint.load(saved)


def test_pointer_moves_last_and_a_name_that_is_taken_is_freed(saved):
    folder = saved.with_name("ckpt")
    checkpoint.save_sharded(trained(3), saved, "manifest")
    assert sharded.folder_of(saved).name == "ckpt.again" and not folder.exists()
    checkpoint.save_sharded(trained(4), saved, "manifest")
    assert sharded.folder_of(saved) == folder and sorted(p.name for p in saved.parent.iterdir()) == ["ckpt", "ckpt.pt"]
    assert checkpoint.load(saved)["cursor"]["samples"] == 8


def test_whole_folder_to_which_nothing_points_yet_gives_way_to_a_new_one(saved):
    """As after a save whose pointer could not be written any more."""
    saved.unlink()
    checkpoint.save_sharded(trained(3), saved, "manifest")
    assert sharded.folder_of(saved) == saved.with_name("ckpt") and checkpoint.load(saved)["cursor"]["samples"] == 6
    assert sorted(path.name for path in saved.parent.iterdir()) == ["ckpt", "ckpt.pt"]


@pytest.mark.parametrize("out", ["texts.pt", "ckpt.pt", "ckpt.bin", "ckpt-1.pt"])
def test_shards_of_a_grown_checkpoint_take_no_place_that_is_not_theirs(saved, out):
    """A folder of the user's, the checkpoint that grows, and another one, beside the name that is asked for."""
    source = saved.with_name("ckpt")
    (saved.parent / "texts").mkdir()
    (saved.parent / "texts" / "thesis").write_text("kept")
    shutil.copytree(source, saved.with_name("ckpt-1"))
    before = {path: path.read_bytes() for path in saved.parent.rglob("*") if path.is_file()}
    options = () if out == "ckpt-1.pt" else ("--overwrite",)
    done = python("grow.py", source, "--g", "2", "--out", saved.with_name(out), *options)
    assert done.returncode == 2 and "choose another name" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert before == {path: path.read_bytes() for path in saved.parent.rglob("*") if path.is_file()}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_write_what_one_process_reads_and_goes_on_with(trainer_of_module, by_two):
    """2 → 1 → 2 ranks, growth between: the same records as of one process throughout."""
    assert sorted(path.name for path in (by_two / "ckpt-96").iterdir()) == [
        ".metadata", "__0_0.distcp", "__1_0.distcp", "nanostack.json",
    ]  # fmt: skip
    sizes = [(by_two / f"ckpt-96/__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 1.1 * min(sizes), "each rank writes its own half"
    whole = checkpoint.load(trainer_of_module.good("whole") / "ckpt.pt")
    out = shutil.copytree(by_two, trainer_of_module.folder / "parts")
    for path in out.glob("ckpt-1*"):
        shutil.rmtree(path)
    sharded.point(out / "ckpt.pt", out / "ckpt-96")
    trainer_of_module.good("parts", "--resume", "--keep", "9")
    assert sharded.folder_of(out / "ckpt.pt") is None, "one process writes one file"
    os.replace(out / "ckpt-160.pt", out / "ckpt.pt")
    assert "from" in trainer_of_module("parts", "--resume", processes=2).stdout
    assert sharded.folder_of(out / "ckpt.pt") == out / "ckpt-192"
    assert_close(read_all(out / "ckpt.pt"), whole)


def assert_close(a: dict, b: dict) -> None:
    assert a["cursor"] == b["cursor"] and a["config"] == b["config"]
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("how", [("--g", "2", "--optimizer", "copy"), ("--op", "zero", "--g", "2", "--noise", "0.1")])
def test_growing_on_disk_part_by_part_equals_growing_the_whole(by_two, tmp_path, how):
    """One process that takes the parts in turn, three ranks that read what two wrote, and the whole at once: bit for bit."""
    source = by_two / "ckpt-96"
    done = python("grow.py", source, *how, "--out", tmp_path / "parts.pt", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["n_params"] > 0, done.stderr
    assert ranks("grow.py", source, *how, "--out", tmp_path / "ranks.pt", number=3).returncode == 0
    assert python("-m", "nanostack", "consolidate", source, tmp_path / "whole.pt").returncode == 0
    assert python("grow.py", tmp_path / "whole.pt", *how, "--out", tmp_path / "file.pt").returncode == 0
    whole = checkpoint.load(tmp_path / "file.pt")
    for name, files in (("parts", 2), ("ranks", 3)):
        assert len(list((tmp_path / name).glob("*.distcp"))) == files
        found = read_all(tmp_path / f"{name}.pt")
        assert_same_state(found, whole)
        assert found["growth"][-1]["rules"] == whole["growth"][-1]["rules"]


def test_consolidating_there_and_back_changes_nothing(saved):
    out, back = saved.with_name("whole.pt"), saved.with_name("back.pt")
    assert python("-m", "nanostack", "consolidate", saved, out).returncode == 0
    assert python("-m", "nanostack", "consolidate", out, back).returncode == 0
    file = checkpoint.load(out)
    assert_same_state(file, read_all(saved))
    assert_same_state(read_all(back), file)
    refused = python("-m", "nanostack", "consolidate", saved, out)
    assert refused.returncode == 2 and "exists already" in refused.stderr and "Traceback" not in refused.stderr


def test_checkpoint_that_was_moved_to_another_disk_and_linked_is_left_there(saved, tmp_path):
    folder, elsewhere = saved.with_name("ckpt"), tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    before = read_all(saved)
    sharded.remove(folder)
    assert not folder.is_symlink() and [path.name for path in folder.parent.glob("*.partial")] == []
    elsewhere.rename(folder)
    assert_same_state(read_all(saved), before)
