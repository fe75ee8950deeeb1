"""The anchor from outside: as many tokens as the other program, a split by place, arms of equal FLOPs."""

import json
import os
from pathlib import Path

import pytest

from nanostack.errors import UserError
from nanostack.text.dataset import Tokens
from study import anchor

TEXT = Path(os.__file__).with_name("argparse.py").read_text()[:30_000]


def test_anchor_trains_both_arms_on_the_first_nine_tenths(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    data = anchor.split(tmp_path / "text.txt", tmp_path)
    assert Tokens(data, "train", 64).n_tokens == 27_001 and Tokens(data, "val", 64).n_tokens == 3_001  # ends of text with them
    found = anchor.main(anchor.Command(tmp_path / "text.txt", steps=20, out=tmp_path / "anchor.json"))
    assert json.loads((tmp_path / "anchor.json").read_text())["arms"] == found["arms"]
    (whole,), (grown,) = found["arms"].values()
    assert whole["tokens"] == 20 * 12 * 64 < grown["tokens"]
    assert grown["flops"] == pytest.approx(whole["flops"], rel=0.05) and max(whole["val_loss"], grown["val_loss"]) < 5


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read as text"), ("Größe", "characters of more than a byte")]
)
def test_text_that_cannot_be_is_refused(content, message, tmp_path):
    if content:
        (tmp_path / "text.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        anchor.main(anchor.Command(tmp_path / "text.txt", out=tmp_path / "anchor.json"))
    with pytest.raises(UserError, match="at least 20 steps"):
        anchor.main(anchor.Command(tmp_path / "text.txt", steps=3))
