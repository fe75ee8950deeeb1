"""Apple's Cut Cross Entropy: its one public function."""

import pytest
from ours import refuse

REPOSITORY = "apple/ml-cross-entropy"
PATHS = (".",)
CUDA = True
TESTS = {
    "tests/test_cce_loss_forward.py": ("test_loss_forward",),
    "tests/test_cce_loss_backward.py": ("test_loss_backward", "test_loss_partials"),
}


def avoids(params: dict, backend: str) -> bool:
    return bool(
        params.get("has_bias") or params.get("softcap") or params.get("z_loss") or params.get("impl") == "torch_compile"
    )


def install(ours, checkout) -> None:
    import cut_cross_entropy

    def linear_cross_entropy(
        e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0, return_lse=False, impl="cce",
    ):  # fmt: skip
        if impl == "torch_compile":
            pytest.skip("not run: another implementation of the peer's")
        asked = {"bias": bias is not None, "softcap": softcap is not None, "returns the log-sum-exp": return_lse}
        for reason in (reason for reason, wanted in asked.items() if wanted):
            refuse(reason)
        shift = int(shift)
        if shift:
            e, targets = e[:, :-shift], targets[:, shift:]
        return ours.linear_cross_entropy(e, c, targets, ignore_index, reduction)

    cut_cross_entropy.linear_cross_entropy = linear_cross_entropy
