"""Growth in depth beside mergekit's passthrough, by which people stack models of theirs: the same weights, bit for bit."""

import json
import os

import pytest
import torch

import grow
from nanostack.config import Growth, Optim
from nanostack.hf import export
from nanostack.model import LlamaConfig
from nanostack.parallel import Placement
from nanostack.state import State
from nanostack.text import tokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
merge = pytest.importorskip("mergekit.merge", reason="compares with mergekit")
config = pytest.importorskip("mergekit.config")
safetensors = pytest.importorskip("safetensors.torch")

LAYERS = 6
SHAPE = LlamaConfig(n_layer=LAYERS, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=260, seq_len=32)
TWICE = [(i, i + 1) for i in range(LAYERS) for _ in range(2)]
OPERATORS = {  # ours: mergekit's ranges of layers, the last one of each excluded
    "stack": (Growth("stack", g=2), [(0, 6)] * 2),
    "stack by three": (Growth("stack", g=3), [(0, 6)] * 3),
    "interleave": (Growth("interleave", g=2), TWICE),
    "middle": (Growth("middle"), [(0, 4), (1, 6)]),
    "solar": (Growth("solar", k=2), [(0, 4), (2, 6)]),
    "list": (Growth(layers="0-1,2*3,1-5"), [(0, 2), *[(2, 3)] * 3, (1, 6)]),
    "zero": (Growth("zero", g=2), TWICE),
}
ZERO = {"scale": [{"filter": name, "value": 0.0} for name in ("o_proj", "down_proj")] + [{"value": 1.0}]}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    shape = LlamaConfig(**vars(SHAPE) | {"tie_embeddings": request.param})
    state = State.create(shape, Optim(), Placement(torch.device("cpu")), 0)
    folder = tmp_path_factory.mktemp("mergekit") / "base"
    export.save(state, folder, None, torch.bfloat16, tokenizer=tokenizer.get("bytes"))
    return folder


@pytest.mark.parametrize(("how", "ranges"), OPERATORS.values(), ids=OPERATORS)
def test_passthrough_of_mergekit_gives_the_weights_of_ours(base, how, ranges, tmp_path):
    sources = [{"model": str(base), "layer_range": list(one)} for one in ranges]
    if how.op == "zero":  # the second of each two
        sources = [source | ({"parameters": ZERO} if i % 2 else {}) for i, source in enumerate(sources)]
    wanted = {"merge_method": "passthrough", "dtype": "bfloat16", "slices": [{"sources": [source]} for source in sources]}
    options = merge.MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
    merge.run_merge(config.MergeConfiguration.model_validate(wanted), str(tmp_path / "theirs"), options)
    grow.main(grow.Command(base, how, tmp_path / "ours", device="cpu"))
    ours, theirs = (
        {name: value for path in (tmp_path / who).glob("*.safetensors") for name, value in safetensors.load_file(path).items()}
        for who in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys() and len(ours) > 9 * LAYERS
    assert not [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("num_hidden_layers", "tie_word_embeddings", "vocab_size", "hidden_size"):
        assert configs[0][key] == configs[1][key], key
