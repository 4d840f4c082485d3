"""What a kernel serves (`Capability`), what a layer or a call needs (`Need`), and every mismatch (`missing`).

Pure value types and one pure function; nothing here imports torch or Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from axattn.errors import Reason


@dataclass(frozen=True, slots=True)
class Need:
    """What one attention layer (at load) or one attention call needs from a kernel.

    A field at its default needs nothing. `None` for a size means "unknown before the call".

    Attributes:
        head_dim: size of a query and key head, D.
        value_dim: size of a value head, Dv (differs from D in multi-head latent attention).
        heads: query heads, H.
        kv_heads: key and value heads, Hkv.
        causal: a query attends to no later key.
        window: sliding window in tokens, None for full attention.
        chunk: chunked attention (Llama 4), chunk size in tokens.
        softcap: logits are ``softcap * tanh(logits / softcap)``.
        sinks: learned attention sinks (``s_aux``).
        bias: an additive position bias (T5).
        sparse: attention over selected indices only (DeepSeek V3.2, MiniMax M3).
        dropout: probability of attention dropout in training.
        dense_mask: an arbitrary 4-D mask that has no compact description.
        padding: rows padded to one length (a 2-D mask with zeros).
        non_contiguous_padding: a known rule without contiguous spans: padding between real tokens, chunks over a cache.
        segments: several documents in one row.
        stems: documents that go on from others of their row: causal attention along several ranges of keys, aligned
            bottom-right (`axattn.documents.boundaries.Segments`).
        cross_lengths: q_len differs from kv_len (decoding, cross attention).
        gradient: gradients of q, k and v.
        deterministic: bitwise reproducible gradients (`axattn.hf.determinism`).
        weights: the attention probabilities (``output_attentions``).
        traced: the call is traced by ``torch.compile``, with a mask that only a tensor describes.
        dtype: ``"float32"``, ``"bfloat16"``, ...; None when unknown.
        device: ``"cpu"``, ``"cuda"``, ...; None when unknown.
    """

    head_dim: int | None = None
    value_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    bias: bool = False
    sparse: bool = False
    dropout: float = 0.0
    dense_mask: bool = False
    padding: bool = False
    non_contiguous_padding: bool = False
    segments: bool = False
    stems: bool = False
    cross_lengths: bool = False
    gradient: bool = False
    deterministic: bool = False
    weights: bool = False
    traced: bool = False
    dtype: str | None = None
    device: str | None = None


Exactness = Literal["exact", "lossy"]


@dataclass(frozen=True, slots=True)
class Refused:
    """A combination that a kernel does not serve, although it serves each part. All given conditions must hold.

    A size or a dtype that is unknown in a `Need` meets no condition, as elsewhere in `missing`.

    Attributes:
        why: continues the sentence after the kernel's name: ``"serves it in inference only"``.
        asks: features of `Capability` that are all needed: ``("window", "gradient")``; also ``"causal"``,
            ``"bidirectional"``, ``"grouped_heads"`` and ``"value_dim_differs"``.
        dtypes: only for these dtypes; empty for any.
        head_dims: smallest and largest value of the larger of the query and value head dims (kernels pad the other one
            to it); None as the largest for no limit, None for any.
        fix: what to type instead, or ``""``.
    """

    why: str
    asks: tuple[str, ...] = ()
    dtypes: frozenset[str] = frozenset()
    head_dims: tuple[int, int | None] | None = None
    fix: str = ""

    def meets(self, need: Need) -> bool:
        """Whether a need is such a combination."""
        return (
            (not self.dtypes or need.dtype in self.dtypes)
            and all(_asks(need, feature) for feature in self.asks)
            and (self.head_dims is None or _within(_larger_head_dim(need), self.head_dims))
        )

    def together(self, need: Need | None = None, shown: Callable[[object], str] = str) -> str:
        """The combination as text, with the sizes and the dtype of a need: ``window in training, float32``."""
        parts = " with ".join(_WORDS.get(feature, feature) for feature in self.asks if feature != "gradient")
        training = "in training" if "gradient" in self.asks else ""
        found = [" ".join(part for part in (parts, training) if part)]
        if self.dtypes:
            found.append(str(need.dtype) if need is not None else " or ".join(sorted(self.dtypes)))
        if self.head_dims is not None:
            size = None if need is None else _larger_head_dim(need)
            low, high = self.head_dims
            span = f"{low} and more" if high is None else f"{low} to {high}"
            found.append(f"head_dim {span}" if size is None else f"head_dim={shown(size)}")
        return ", ".join(part for part in found if part)


_WORDS = {
    "bidirectional": "bidirectional attention",
    "grouped_heads": "grouped heads",
    "value_dim_differs": "value heads of another size",
    "cross_lengths": "q_len different from kv_len",
}


def _larger_head_dim(need: Need) -> int | None:
    if need.head_dim is None or need.value_dim is None:
        return need.head_dim
    return max(need.head_dim, need.value_dim)


def _within(size: int | None, ends: tuple[int, int | None]) -> bool:
    return size is not None and ends[0] <= size and (ends[1] is None or size <= ends[1])


def _asks(need: Need, feature: str) -> bool:
    """Whether a need includes a feature of `Capability`."""
    if feature == "bidirectional":
        return not need.causal
    if feature == "grouped_heads":
        return bool(need.heads and need.kv_heads and need.heads != need.kv_heads)
    if feature == "value_dim_differs":
        return need.head_dim is not None and need.value_dim is not None and need.value_dim != need.head_dim
    asked = getattr(need, feature)
    return asked is not None and asked is not False and asked != 0.0


@dataclass(frozen=True, slots=True)
class Capability:
    """What a kernel serves. Every feature is off unless a backend turns it on.

    Attributes:
        exactness: ``auto`` never chooses ``"lossy"`` kernels (int8, fp8).
        devices: supported device types.
        dtypes: supported dtypes.
        head_dims: the only supported head dims, or None for any up to `max_head_dim`.
        max_head_dim: largest head dim, None for no limit.
        head_dim_multiple: head dims must be a multiple of this.
        head_dim_pairs: (query, value) head dims that are supported above `max_head_dim`.
        value_dim_differs: value and query heads may differ in size.
        value_dim_padded: smaller value heads are padded to the query heads' size, so only that size is checked.
        second_gradient: supports double backward; checked in the backward only (`axattn.patches.double_backward`).
        refuses: combinations of supported features that the kernel does not serve.
        (others): True when the kernel supports the field of `Need` of that name.
    """

    exactness: Exactness = "exact"
    devices: frozenset[str] = frozenset()
    dtypes: frozenset[str] = frozenset()
    head_dims: frozenset[int] | None = None
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    head_dim_pairs: frozenset[tuple[int, int]] = frozenset()
    value_dim_differs: bool = False
    value_dim_padded: bool = False
    grouped_heads: bool = False
    causal: bool = False
    bidirectional: bool = False
    window: bool = False
    chunk: bool = False
    softcap: bool = False
    sinks: bool = False
    bias: bool = False
    sparse: bool = False
    dropout: bool = False
    dense_mask: bool = False
    padding: bool = False
    non_contiguous_padding: bool = False
    segments: bool = False
    stems: bool = False
    cross_lengths: bool = False
    gradient: bool = False
    deterministic: bool = False
    second_gradient: bool = False
    weights: bool = False
    traced: bool = False
    refuses: tuple[Refused, ...] = ()
    notes: dict[str, str] = field(default_factory=dict, hash=False)

    def features(self) -> dict[str, bool]:
        """The boolean features by name, in the order of declaration (for the docs' tables)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), bool)}


_FLAGS: dict[str, str] = {
    "chunk": "no chunked attention",
    "softcap": "no softcap",
    "sinks": "no attention sinks",
    "bias": "no additive position bias",
    "sparse": "no sparse indices",
    "dropout": "no attention dropout",
    "window": "no sliding window",
    "dense_mask": "no arbitrary 4-D mask",
    "padding": "no padding mask",
    "non_contiguous_padding": "no padding between real tokens",
    "segments": "no packed documents",
    "stems": "no documents that go on from others",
    "cross_lengths": "no support for q_len different from kv_len",
    "gradient": "no gradient",
    "deterministic": "no deterministic gradient",
    "weights": "no attention weights to return",
    "traced": "no support for compiled graphs",
}


def missing(
    need: Need, capability: Capability, name: str = "this kernel", *, shown: Callable[[object], str] = str
) -> list[Reason]:
    """Every reason why `capability` does not cover `need`; empty when it does. Pure.

    Args:
        need: of a call or a layer.
        capability: of a kernel.
        name: the kernel's.
        shown: formats a number; the symbols of a compiled graph need a formatter of their own.
    """
    reasons: list[Reason] = []

    def add(feature: str, text: str, fix: str = "") -> None:
        reasons.append(Reason(feature, text, fix))

    for flag, clause in _FLAGS.items():
        if not getattr(capability, flag) and _asks(need, flag):
            asked = getattr(need, flag)
            text = flag if asked is True else f"{flag}={shown(asked)}"
            add(flag, f"{text} ({name} has {clause})")
    if need.causal and not capability.causal:
        add("causal", f"causal attention ({name} is bidirectional only)")
    if not need.causal and not capability.bidirectional:
        add("causal", f"bidirectional attention ({name} is causal only)")
    reasons += _missing_head_dims(need, capability, name, shown)
    if need.dtype is not None and need.dtype not in capability.dtypes:
        fix = "dtype=torch.bfloat16, or bf16 autocast" if "bfloat16" in capability.dtypes else ""
        add("dtype", f"{need.dtype} ({name} serves {', '.join(sorted(capability.dtypes))})", fix)
    if need.device is not None and need.device not in capability.devices:
        add("device", f"device {need.device} ({name} runs on {', '.join(sorted(capability.devices))})")
    for refused in capability.refuses:
        if refused.meets(need):
            feature = (*refused.asks, *(["dtype"] if refused.dtypes else []), "head_dim")[0]
            add(feature, f"{refused.together(need, shown)} ({name} {refused.why})", refused.fix)
    return reasons


def _missing_head_dims(need: Need, capability: Capability, name: str, shown: Callable[[object], str]) -> list[Reason]:
    reasons: list[Reason] = []
    value_dim = need.head_dim if need.value_dim is None else need.value_dim
    paired = (need.head_dim, value_dim) in capability.head_dim_pairs
    for label, dim in (("head_dim", need.head_dim), ("value_dim", need.value_dim)):
        if dim is None or (label == "value_dim" and dim == need.head_dim):
            continue
        if label == "value_dim" and capability.value_dim_padded and need.head_dim and dim < need.head_dim:
            continue
        if capability.head_dims is not None and dim not in capability.head_dims:
            served = ", ".join(str(d) for d in sorted(capability.head_dims))
            reasons.append(Reason(label, f"{label}={shown(dim)} ({name} serves {served})"))
        elif capability.max_head_dim is not None and dim > capability.max_head_dim and not paired:
            reasons.append(Reason(label, f"{label}={shown(dim)} ({name} serves up to {capability.max_head_dim})"))
        elif dim % capability.head_dim_multiple:
            reasons.append(
                Reason(label, f"{label}={shown(dim)} ({name} serves multiples of {capability.head_dim_multiple})")
            )
    if need.head_dim is not None and value_dim != need.head_dim and not capability.value_dim_differs:
        text = f"value head dim {shown(value_dim)} differs from query head dim {shown(need.head_dim)} ({name} can't)"
        reasons.append(Reason("value_dim", text))
    if need.heads and need.kv_heads and need.heads != need.kv_heads and not capability.grouped_heads:
        text = f"{shown(need.heads)} query heads over {shown(need.kv_heads)} KV heads ({name} has no GQA)"
        reasons.append(Reason("kv_heads", text))
    return reasons
