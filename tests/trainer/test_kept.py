"""Which checkpoints stay, under which names, whatever a user has put among them."""

import errno
import os
import shutil

import pytest
from conftest import assert_same_state
from test_checkpoint import trained

from nanostack import checkpoint, kept, sharded


@pytest.fixture
def ckpt(tmp_path):
    """ckpt.pt after two steps (4 samples), and ckpt-2.pt after one."""
    for steps in (1, 2):
        checkpoint.save(trained(steps), tmp_path / "ckpt.pt", keep=9)
    return tmp_path / "ckpt.pt"


def names(ckpt) -> list[str]:
    return sorted(path.name for path in ckpt.parent.iterdir())


def test_old_checkpoint_that_cannot_be_removed_is_told_once_and_stops_no_save(tmp_path, monkeypatch, capsys):
    rename = os.rename

    def busy(source, target):
        if os.path.basename(source) == "ckpt-2":  # as where another file system is mounted
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    for steps in (1, 2, 3, 4):
        checkpoint.save_sharded(trained(steps), tmp_path / f"ckpt-{2 * steps}.pt")
        sharded.point(tmp_path / "ckpt.pt", tmp_path / f"ckpt-{2 * steps}")
        kept.prune(tmp_path / "ckpt.pt", keep=1)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["ckpt-2", "ckpt-8"], "those after it go all the same"
    assert capsys.readouterr().err.count("is too old to be kept, and cannot be removed: Device or resource busy") == 1


def test_link_to_a_checkpoint_as_the_last_one_leaves_it(ckpt):
    ckpt.unlink()
    ckpt.symlink_to("ckpt-2.pt")
    before = checkpoint.load(ckpt.with_name("ckpt-2.pt"))
    checkpoint.save(trained(3), ckpt, keep=9)
    assert names(ckpt) == ["ckpt-2.pt", "ckpt.pt"] and not ckpt.is_symlink()
    assert_same_state(checkpoint.load(ckpt.with_name("ckpt-2.pt")), before)


def test_checkpoint_of_another_run_takes_the_place_of_none_of_this_one(ckpt, tmp_path):
    own, other = checkpoint.load(ckpt.with_name("ckpt-2.pt")), trained(1)
    other.seed = 7
    checkpoint.save(other, tmp_path / "other.pt")
    shutil.copy(tmp_path / "other.pt", ckpt)
    checkpoint.save(trained(3), ckpt, keep=9)
    assert checkpoint.load(ckpt.with_name("ckpt-2.pt"))["seed"] == 7
    assert_same_state(checkpoint.load(ckpt.with_name("ckpt-2.pt.left")), own)


@pytest.mark.parametrize("then", ["shards", "file", "back"])
def test_folder_under_another_name_gets_its_number_when_it_is_the_last_no_more(tmp_path, then):
    """As `nanostack consolidate whole.pt out/run/ckpt.pt` makes one."""
    ckpt = tmp_path / "ckpt.pt"
    checkpoint.save_sharded(trained(1), ckpt)
    assert names(ckpt) == ["ckpt", "ckpt.pt"]
    if then == "shards":
        with checkpoint.Saver(ckpt, None, 9, True, print) as saver:
            saver.save(trained(2))
    elif then == "file":
        checkpoint.save(trained(2), ckpt, keep=9)
    else:
        (elsewhere := tmp_path / "elsewhere").mkdir()
        checkpoint.save_sharded(trained(2), elsewhere / "good.pt")
        kept.go_back(elsewhere / "good", ckpt)
    assert "ckpt" not in names(ckpt) and checkpoint.load(tmp_path / "ckpt-2")["cursor"]["samples"] == 2
    assert checkpoint.load(ckpt)["cursor"]["samples"] == 4


def test_damaged_checkpoint_has_the_number_in_its_name(ckpt):
    damaged = ckpt.with_name("ckpt-2.pt")
    damaged.write_bytes(b"torn")
    assert kept.samples_of(damaged) is None and kept.number_of(damaged, ckpt) == 2


def test_copy_of_a_folder_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (run := tmp_path / "run").mkdir()
    checkpoint.save_sharded(trained(), elsewhere / "ckpt-4.pt")

    def full(*_, **how):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ValueError, match=r"could not copy .*ckpt-4 to .*run/ckpt-4: .*No space left"):
        kept.go_back(elsewhere / "ckpt-4", run / "ckpt.pt")
    assert list(run.iterdir()) == []
