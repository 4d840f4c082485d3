"""The functions that Transformers calls, with FlashAttention 2's signatures; what they can't serve, they refuse.

Every keyword that Transformers can pass is in the signature: it leaves out a keyword that a kernel does not name
(`sliding_window`, `s_aux`), without a word.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from . import int8_attention, int8_operator
from .document_statistics import Documents
from .flash_backward import Packed, exact_forward

_NAME = "int8-flash-attn"
_INTERPRETED = not isinstance(int8_attention._forward_kernel, JITFunction)  # TRITON_INTERPRET=1 when it was imported
_DETERMINISTIC = "torch's backward is deterministic under torch.use_deterministic_algorithms(True)"


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """INT8 attention of whole rows.

    Args:
        q: ``[B, S, H, D]``.
        k: ``[B, T, Hkv, D]``.
        v: ``[B, T, Hkv, D]``.
        dropout_p: must be 0; other arguments are those of `flash_attn_varlen_func`.

    Returns:
        ``[B, S, H, D]``.

    Raises:
        NotImplementedError: it can't serve this call.
        ValueError: the shapes do not fit each other.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v are [B, S, H, D]: got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    rows = q.shape[0]
    ends = [torch.arange(rows + 1, dtype=torch.int32, device=x.device) * x.shape[1] for x in (q, k)]
    out = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)),
        *ends,
        q.shape[1],
        k.shape[1],
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )
    return out.unflatten(0, (rows, -1))


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor | None = None,
    max_seqlen_k: int | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """INT8 attention of packed documents; each attends to itself only.

    If no document has more than one query (decoding), it runs on torch's flash attention, which is exact: INT8 would
    quantise the cache anew for every token.

    Args:
        q: ``[tokens, H, D]``, bfloat16 or float16 (in Triton's interpreter float16 or float32); D a multiple of 8,
            at most 256.
        k: ``[tokens, Hkv, D]``; H a multiple of Hkv.
        v: ``[tokens, Hkv, D]``.
        cu_seqlens_q: ``[documents + 1]``, from 0 to the tokens of `q`. Read to the host once per call.
        cu_seqlens_k: likewise of `k`.
        max_seqlen_q: not needed: the lengths are those of `cu_seqlens_q`.
        max_seqlen_k: not needed.
        dropout_p: must be 0.
        softmax_scale: factor on the logits; None: D to the power of -0.5.
        causal: causal mask, aligned bottom-right: the last query of a document sits at its last key.
        window_size: visible keys to the left and right of a query's own; -1: all. Under a causal mask the right one has
            no effect; without, both must be equal.
        softcap: in inference only; 0 or None: none.
        alibi_slopes: must be None.
        deterministic: with a gradient, needs ``torch.use_deterministic_algorithms(True)``; torch's backward obeys it.
        return_attn_probs: must be False.
        block_table: must be None.
        s_aux: attention sinks; must be None.

    Returns:
        ``[tokens, H, D]``; 0 for a query that attends to no key.

    Raises:
        NotImplementedError: it can't serve this call; every reason is given.
        ValueError: shapes, dtypes, devices or `cu_seqlens` do not fit each other.
    """
    tensors = (q, k, v)
    _require_matching(tensors)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    left, right = (-1 if side is None or side < 0 else side for side in window_size)
    refused = (
        (bool(dropout_p), f"dropout_p={dropout_p} (there is no dropout; set attention_dropout=0)"),
        (alibi_slopes is not None, "alibi_slopes (there is no position bias)"),
        (s_aux is not None, "s_aux (there are no attention sinks)"),
        (block_table is not None, "block_table (there is no paged cache)"),
        (return_attn_probs, "return_attn_probs=True (the weights are never in memory)"),
        (bool(softcap) and gradient, f"softcap={softcap} with a gradient (it has no gradient)"),
        (not causal and left != right, f"window_size={window_size} (without a causal mask it must be symmetric)"),
        (deterministic and gradient and not _deterministic(), f"deterministic=True with a gradient ({_DETERMINISTIC})"),
    )
    _require([reason for applies, reason in refused if applies] + _unsupported(q))
    window = left + 1 if left >= 0 else None
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, scale, softcap or 0.0, gradient)


@torch.compiler.disable  # it reads lengths to the host
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float,
    gradient: bool,
) -> torch.Tensor:
    q_lengths, k_lengths = _lengths("q", cu_q, q.shape[0]), _lengths("k", cu_k, k.shape[0])
    if len(q_lengths) != len(k_lengths):
        raise ValueError(f"cu_seqlens_q has {len(q_lengths)} documents, cu_seqlens_k has {len(k_lengths)}")
    if not q.shape[0]:
        return q.clone()
    if not k.shape[0]:  # nobody attends to anything; the gradient is 0
        return q.masked_fill(torch.ones(1, 1, 1, dtype=torch.bool, device=q.device), 0.0)
    cu_q, cu_k = (x.to(q.device, torch.int32) for x in (cu_q, cu_k))
    packed = Packed(cu_q, cu_k, max(q_lengths), max(k_lengths), causal, window, scale)
    if packed.max_q == 1 and not softcap and not gradient:
        return exact_forward(q, k, v, packed)[0]
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.device.type == "cuda" else 0
    blocks = _blocks(q_lengths, int8_operator.block_of(q), q.device, stream)
    keys = None if softcap else _documents(k_lengths, q.device, stream)
    out = int8_operator.attention(q, k, v, packed, blocks, keys, softcap, exact_backward=False)[0]
    if out.requires_grad:
        out.register_hook(_refuse_second_gradient)
    return out


# The layers of a model share lengths. The copies to the GPU are queued on one stream, so the others have their own.
@functools.lru_cache(maxsize=16)
def _blocks(lengths: tuple[int, ...], block: int, device: torch.device, stream: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return int8_attention.query_blocks(lengths, block, device)


@functools.lru_cache(maxsize=16)
def _documents(lengths: tuple[int, ...], device: torch.device, stream: int) -> Documents:
    with torch.inference_mode(False):
        documents = Documents(lengths, device)
        documents.mean(torch.zeros(sum(lengths), 1, 1, device=device))  # what it keeps is made here
        documents.document_ids  # noqa: B018
        return documents


def _lengths(of: str, cu_seqlens: torch.Tensor, tokens: int) -> tuple[int, ...]:
    """The lengths of the documents, on the host.

    Raises:
        ValueError: they are not the lengths of `tokens` tokens.
    """
    ends = cu_seqlens.tolist() if cu_seqlens.dim() == 1 else []
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        shown = f"{ends[:4]}...{ends[-1:]}" if len(ends) > 5 else ends
        raise ValueError(f"cu_seqlens_{of} must rise from 0 to the {tokens} tokens of {of}: got {shown}")
    return tuple(b - a for a, b in itertools.pairwise(ends))


def _require_matching(tensors: tuple[torch.Tensor, ...]) -> None:
    q, k, v = tensors
    shapes = ", ".join(str(list(x.shape)) for x in tensors)
    if any(x.dim() != 3 for x in tensors) or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q is [tokens, H, D], k and v are [tokens, Hkv, D]: got {shapes}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q are a multiple of those of k and v: got {shapes}")
    if len({x.dtype for x in tensors}) > 1 or len({x.device for x in tensors}) > 1:
        raise ValueError(f"q, k and v have one dtype and one device: got {[(x.dtype, x.device) for x in tensors]}")


def _unsupported(q: torch.Tensor) -> list[str]:
    """Why the kernels can't run on the device, dtype or head dim of `q`."""
    reasons = []
    if q.device.type == "cpu":
        if not _INTERPRETED:
            reasons.append(
                "a CPU (only in Triton's interpreter, for tests: set TRITON_INTERPRET=1 before it is loaded)"
            )
    elif q.device.type != "cuda" or torch.version.hip:
        reasons.append(f"{'ROCm' if torch.version.hip else q.device.type} (it needs an NVIDIA GPU)")
    elif torch.cuda.get_device_capability(q.device) < (8, 0):
        reasons.append(f"{torch.cuda.get_device_name(q.device)} (it needs compute capability 8.0)")
    if q.dtype not in (torch.float16, torch.float32 if _INTERPRETED else torch.bfloat16):
        interpreter = "Triton's interpreter, which multiplies the bits of bfloat16, takes float16 and float32"
        reasons.append(f"{q.dtype} ({interpreter if _INTERPRETED else 'load the model in bfloat16, or use autocast'})")
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 256:
        reasons.append(f"head_dim={q.shape[-1]} (it serves multiples of 8 up to 256)")
    return reasons


def _deterministic() -> bool:
    """Whether torch's flash backward is deterministic: if it only had to warn, it would not be."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _require(reasons: list[str]) -> None:
    if reasons:
        raise NotImplementedError(
            f'{_NAME} can\'t serve this call: {"; ".join(reasons)}. Otherwise use attn_implementation="sdpa".'
        )


def _refuse_second_gradient(grad: Any) -> None:
    """Torch would return wrong second derivatives: the gradients of a kernel's own backward have no graph."""
    if torch.is_grad_enabled():
        _require(["a backward with create_graph=True (its gradient can't be differentiated again)"])
