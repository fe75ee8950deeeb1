"""The fused operations of a Llama: each a pure function in Triton, in optimised torch and, for the CPU, in C,
and beside it its formula as a few lines of torch, `..._reference`, which is what tests compare with."""

if __name__ == "kernels":  # by the short name that a clone has for it
    from nanostack.names import alias_kernels

    alias_kernels()
else:
    from . import cpu
    from .attention import (
        Documents,
        HeadNorms,
        documents,
        flash_attention,
        flash_attention_reference,
        rotary_attention,
        rotary_attention_reference,
        turned,
    )
    from .attention import flops as flash_attention_flops
    from .attention_triton import widest_head
    from .dispatch import set_backend, unavailable_reason
    from .linear import linear, linear_reference
    from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
    from .norm_rotary import norm_rotary, norm_rotary_reference
    from .rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
    from .rotary import rotary, rotary_reference
    from .swiglu import swiglu, swiglu_reference

__all__ = [
    "Documents",
    "HeadNorms",
    "add_rms_norm",
    "add_rms_norm_reference",
    "cpu",
    "documents",
    "flash_attention",
    "flash_attention_flops",
    "flash_attention_reference",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_reference",
    "norm_rotary",
    "norm_rotary_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_attention",
    "rotary_attention_reference",
    "rotary_reference",
    "set_backend",
    "swiglu",
    "swiglu_reference",
    "turned",
    "unavailable_reason",
    "widest_head",
]
