"""QuACK: its public functions; its own modules need CUTLASS, so only the references in them are evaluated."""

import torch
from ours import members_of, module, refuse

REPOSITORY = "Dao-AILab/quack"
PATHS = (".",)
CUDA = True
TESTS = {
    "tests/test_rmsnorm.py": (
        "test_rmsnorm_forward_backward",
        "test_rmsnorm_weight_offset",
        "test_rmsnorm_noncontiguous_grad",
        "test_rmsnorm_qk",
        "test_rmsnorm_strided_tensor",
        "test_rmsnorm_with_bias",
        "test_rmsnorm_with_residual",
        "test_rmsnorm_prenorm_false",
    ),
    "tests/test_rotary.py": (
        "test_rotary_emb_func",
        "test_rotary_emb_vector_width_selection",
        "test_rotary_emb_dim_dtype_grid",
        "test_rotary_emb_strided_x_qkv_view",
        "test_rotary_emb_strided_cos_sin",
        "test_rotary_emb_odd_nheads_block_h",
        "test_rotary_emb_varlen_func",
        "test_rotary_emb_qkv",
        "test_rotary_emb_kv",
    ),
    "tests/test_linear_cross_entropy.py": (
        "test_chunked_linear_cross_entropy",
        "test_scaled_exp_linear_cross_entropy",
        "test_chunked_linear_cross_entropy_ignore_index",
        "test_chunked_linear_cross_entropy_no_grad",
        "test_chunked_linear_cross_entropy_partial_grad",
    ),
}


LARGEST = {"torch": 1 << 22, "c": 1 << 22, "triton": 1 << 18}  # elements


def avoids(params: dict, backend: str) -> bool:
    size = params.get("M", 1) * params.get("N", 1), params.get("B_L", 1) * params.get("V", 1)
    return bool(max(size) > LARGEST[backend] or params.get("use_compile") or params.get("inplace"))


def install(ours, checkout) -> None:
    def rmsnorm(
        x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
        weight_offset=0.0,
    ):  # fmt: skip
        asked = {"norm with a bias": bias is not None, "a weight for each head": weight is not None and weight.ndim > 1}
        asked["output in another dtype"] = out_dtype not in (None, x.dtype)
        asked["residual in another dtype"] = residual is not None and residual_dtype not in (None, x.dtype)
        for reason in (reason for reason, wanted in asked.items() if wanted):
            refuse(reason)
        if residual is None:
            return ours.norm(x, weight, eps, weight_offset)
        both = ours.add_rms_norm(x, residual, weight, eps)
        return both if prenorm else both[0]

    def rotate(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=None, cu_seqlens=None, max_seqlen=None):
        if inplace:
            refuse("rotary in place")
        return ours.rotate(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens)

    def rotate_either_way(x, cos, sin, conjugate=False, **options):
        return rotate(x, cos, -sin if conjugate else sin, **options)

    def rotate_in_place(*args, **options):
        refuse("rotary in place")

    def cross_entropy(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None):
        return ours.linear_cross_entropy(x, weight, target, ignore_index, reduction)

    folder = checkout / "quack"
    module("quack", folder)
    module("quack.cute_dsl_utils", get_device_capacity=torch.cuda.get_device_capability)
    module("quack.rmsnorm_config", RmsNormBwdConfig=dict, RmsNormFwdConfig=dict)
    references = members_of(folder / "rmsnorm.py", "rmsnorm_ref", "rmsnorm_bwd_ref")
    others = dict.fromkeys(("_compile_rmsnorm_fwd", "rmsnorm_bwd", "rmsnorm_bwd_tuned", "rmsnorm_fwd", "rmsnorm_fwd_tuned"))
    module("quack.rmsnorm", rmsnorm=rmsnorm, **references, **others)
    in_place = dict.fromkeys(("apply_rotary_emb_qkv_", "apply_rotary_emb_kv_"), rotate_in_place)
    module("quack.rotary", apply_rotary=rotate_either_way, apply_rotary_emb=rotate, **in_place)
    module(
        "quack.linear_cross_entropy",
        chunked_linear_cross_entropy=cross_entropy,
        scaled_exp_linear_cross_entropy=cross_entropy,
        scaled_exp_lce_supported=lambda *args: False,
        **members_of(folder / "linear_cross_entropy.py", "linear_cross_entropy_func_ref"),
    )
