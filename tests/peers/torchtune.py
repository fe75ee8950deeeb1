"""torchtune: the methods of its modules that compute, over the weights and caches that the modules hold."""

import logging

import pytest
import torch
from ours import members_of, module, refuse

REPOSITORY = "pytorch/torchtune"
PATHS = (".",)
CUDA = False
TESTS = {
    "tests/torchtune/modules/test_rms_norm.py": ("test_forward", "test_forward_fp16"),
    "tests/torchtune/modules/test_position_embeddings.py": (
        "test_forward",
        "test_forward_with_curr_pos",
        "test_forward_with_packed_pos",
        "test_forward_with_2d_pos_ids",
        "test_rope_init_meta_device",
    ),
    "tests/torchtune/modules/test_attention.py": (
        "test_forward_gqa",
        "test_forward_gqa_kv_cache",
        "test_forward_mha",
        "test_forward_mha_kv_cache",
        "test_forward_mqa",
        "test_forward_mqa_kv_cache",
    ),
    "tests/torchtune/modules/loss/test_cross_entropy_loss.py": ("test_linear_chunked_cross_entropy_loss",),
}


def install(ours, checkout) -> None:
    package = checkout / "torchtune"
    module("torchtune", package)
    for name in ("modules", "training", "models", "models.llama3_1"):
        module(f"torchtune.{name}", package / name.replace(".", "/"))
    said = {
        "get_logger": lambda *args: logging.getLogger("torchtune"),
        "deprecated": lambda *args, **options: lambda thing: thing,
    }
    module("torchtune.utils", package / "utils", **said)
    module("torchao")
    module("torchtune.training.seed", set_seed=torch.manual_seed)
    module("tests")
    names = ("assert_expected", "fixed_init_tensor", "fixed_init_model", "gpu_test", "mps_ignored_test")
    module("tests.test_utils", **members_of(checkout / "tests/test_utils.py", *names, pytest=pytest))
    import torchtune.modules as modules
    from torchtune.modules import attention, attention_utils, kv_cache, position_embeddings, rms_norm
    from torchtune.modules.loss import cross_entropy_loss

    def norm(self, x):
        if x.dtype != self.scale.dtype:
            refuse("output in another dtype")
        return ours.rms_norm(x, self.scale, self.eps)

    def rope(self, x, *, input_pos=None):
        """cache (position, K/2, 2) of cosines and sines; input_pos (T,) or (B, T)."""
        T = x.shape[1]
        positions = torch.arange(T) if input_pos is None else input_pos
        tables = [self.cache[row.long()].unbind(-1) for row in torch.atleast_2d(positions)]
        rows = x.split(1) if len(tables) > 1 else [x]
        return torch.cat([ours.rotate(row, *table, True) for row, table in zip(rows, tables, strict=True)])

    def attention_call():
        def attend(q, k, v, mask, dropout_p, is_causal):
            if mask is not None:
                refuse("any mask of scores")
            if dropout_p:
                refuse("dropout")
            return ours.flash_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal).transpose(1, 2)

        return attend

    def cross_entropy(self, hidden, targets):
        """The linear layer of their test has a bias, which its reference leaves out; here it is left out, too."""
        return ours.linear_cross_entropy(hidden, self.linear_projection.weight, targets, self.ignore_index, "sum")

    rms_norm.RMSNorm.forward = norm
    position_embeddings.RotaryPositionalEmbeddings.forward = rope
    attention_utils._sdpa_or_flex_attention = attention._sdpa_or_flex_attention = attention_call
    cross_entropy_loss.LinearCrossEntropyLoss.compute_cross_entropy = cross_entropy
    for theirs in (attention, kv_cache, position_embeddings, rms_norm):
        vars(modules).update({name: value for name, value in vars(theirs).items() if name[0].isupper()})
