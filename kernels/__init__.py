"""The fused operations of a Llama: each a pure function with a Triton kernel, a torch reference and, for the CPU, C."""

if __name__ == "kernels":  # by the short name that a clone has for it
    from nanostack.names import alias_kernels

    alias_kernels()
else:
    from . import cpu
    from .attention import flash_attention, rotary_attention
    from .attention import flops as flash_attention_flops
    from .dispatch import set_backend, unavailable_reason
    from .linear import linear
    from .linear_cross_entropy import linear_cross_entropy
    from .rms_norm import add_rms_norm, rms_norm
    from .rotary import rotary
    from .swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "cpu",
    "flash_attention",
    "flash_attention_flops",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "rotary_attention",
    "set_backend",
    "swiglu",
    "unavailable_reason",
]
