"""INT8 attention with a true gradient, called as FlashAttention is: Triton and torch only.

Q.K^T in INT8 with a scale per token, P.V in 16 bit, softmax and logsumexp in fp32; backward is flash attention's, from
the output and logsumexp of the INT8 forward. See the card (README.md) for errors and limits.
"""

from __future__ import annotations

from .interface import flash_attn_func, flash_attn_varlen_func

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
