"""Names of settings in training YAML: axolotl's attention settings, and misspellings of axattn's. Pure strings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

HYBRID = "gemma4_hybrid_attn_impl"

COMPUTED = ("attn_supports_packing", "attn_uses_flash_lib", "attn_needs_dtype_cast")
"""The flags that `AttentionConfig` computes from the name and refuses as input."""

PLUGIN_KEYS = {"axattn": "attn_implementation", "axattn_on_unsupported": "on_unsupported"}
"""Keys of `axattn.integrations.axolotl`, and the settings that they stand for."""

AXOLOTL_KEYS: tuple[str, ...] = (
    HYBRID,
    "large_head_attention",
    "flash_attn_d512",
    "sdpa_varlen",
    "fused_attn_kernel",
    "flex_attn_compile_kwargs",
    "flash_attn_cross_entropy",
    "flash_attn_rms_norm",
    "flash_attn_fuse_mlp",
    "flash_attn_fuse_qkv",
    "flash_optimum",
    "scaling_softmax",
    "scaling_softmax_factor",
    "scaling_softmax_bias",
    "attn_decontaminates_packing",
    "eval_sample_packing",
    "pretrain_multipack_attn",
    "batch_flattening",
    "fa_varlen_kwargs_in_collator",
    "sequence_parallel_degree",
    "context_parallel",
    "heads_k_stride",
    "ring_attn_func",
    "use_kernels",
    "use_dsv4_kernels",
    "use_glm_dsa_kernels",
)
"""Settings of axolotl (0.18 to 0.21) that affect attention and that axolotl reads itself: `migrate` keeps them.
Settings that only control how rows are filled (``sample_packing_bin_size``, ...) are not listed."""

_CUTOFF = 0.88  # no setting of axolotl 0.18-0.21 (844 names) is this similar to axattn's; "flash_atention" has 0.97


def misspelled_setting(key: str, settings: Iterable[str]) -> str | None:
    """The setting that `key` misspells, or None if it is a setting or similar to none.

    Args:
        key: a key as written.
        settings: the valid settings.
    """
    settings = list(settings)
    if key in settings or key in AXOLOTL_KEYS:
        return None
    normalised = key.strip().lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(normalised, settings, n=1, cutoff=_CUTOFF)
    return close[0] if close and close[0][0] == normalised[:1] else None
