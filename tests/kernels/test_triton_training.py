"""A whole run, growth included, through the Triton kernels in their interpreter: the losses of the torch path."""

import pytest
from conftest import records

SHORT = [  # two steps of 16 tokens, two more as two layers; sizes are for the tests of each kernel
    *("--model.n_layer", "1", "--model.n_head", "2", "--model.n_kv_head", "1", "--model.seq_len", "8"),
    *("--data.val_tokens", "16", "--batch_tokens", "16", "--micro_batch", "2", "--log_interval", "16"),
    *("--stages.0.tokens", "32", "--stages.1.tokens", "32"),
    *("--stages.0.warmup_tokens", "16", "--stages.1.warmup_tokens", "16"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [("--model.qk_norm", "--model.qkv_bias", "--model.d_head", "24"), ("--data.document_mask",)],
    ids=["qwen3, whole rows", "documents"],
)
def test_triton_run_gives_the_losses_of_the_torch_run(how, trainer):
    changes = [*SHORT, *how]
    torch_run = records(trainer.good("torch", *changes, "--kernels", "torch"))
    triton_run = records(trainer.good("triton", *changes, "--kernels", "triton", env={"TRITON_INTERPRET": "1"}))
    assert len(torch_run) == 5
    for name in ("loss", "val_loss", "grad_norm"):
        expected = [r[name] and pytest.approx(r[name], rel=2e-5) for r in torch_run]
        assert [r[name] for r in triton_run] == expected, name
