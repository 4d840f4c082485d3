"""Kernels side by side on one GPU, in one command: ``python -m benchmarks.gpu [--output FILE] [--only PART ...]``.

Parts: attention (every kernel, forward and with backward, dense and packed), torch (torch's own dense kernels),
overhead (through axattn against the kernel called directly), step (a training step of LLaMA-, Qwen- and Gemma-type
models), masks (memory of the masks of one forward), quantiser (fp8 by axattn's, torchao's and torch's passes).
The aim is eight minutes on an H200; it has not been timed there. It prints as it goes and writes after each part.
``--tiny`` runs small shapes, on a CPU too: a test of the script.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from axattn.tools.bench.kernels import Attention, bench, mask_of, usable_kernels
from axattn.tools.bench.shapes import Shape
from axattn.tools.bench.steps import bench_step
from axattn.tools.bench.timing import Run, matmul_tflops, timed, working
from benchmarks.measure import machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16


def attention(tiny: bool) -> list[dict[str, Any]]:
    """Every kernel on causal attention, GQA 4:1, bf16, 16k tokens or one row of 32k."""
    found = []
    for size in (64,) if tiny else (64, 128, 256):
        for length in (128, 256) if tiny else (2048, 8192, 32768, 65536):
            heads, kv_heads = (4, 1) if tiny else (4096 // size, 1024 // size)
            dense = Shape(1 if tiny else max(1, 16384 // length), heads, kv_heads, length, size)
            packed = Shape(1, heads, kv_heads, length, size).packed(16)
            for backward in (False, True):
                rounds = 3 if tiny or length > 32768 else 10
                done = bench((dense, packed), backward=backward, rounds=rounds, dtype=BF16)
                entry = done.to_dict()
                entry.pop("machine")
                print(json.dumps(entry), flush=True)
                found.append(entry)
    return found


def own_kernels(tiny: bool) -> list[dict[str, Any]]:
    """Torch's flash, cuDNN and memory-efficient kernels, called by name on dense rows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = []
    for size in (64,) if tiny else (64, 128, 256):
        for length in (128,) if tiny else (2048, 8192, 32768):
            rows, heads = (1, 4) if tiny else (max(1, 16384 // length), 4096 // size)
            shape = Shape(rows, heads, heads, length, size)
            q, k, v = (torch.randn(rows, heads, length, size, device=DEVICE, dtype=BF16) for _ in range(3))

            def runner(backend: Any, q: Any = q, k: Any = k, v: Any = v) -> Run:
                def run() -> None:
                    with torch.no_grad(), sdpa_kernel(backend):
                        F.scaled_dot_product_attention(q, k, v, is_causal=True)

                return run

            named = {
                "flash": SDPBackend.FLASH_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION,
            }
            runs, failed = working({name: runner(backend) for name, backend in named.items()})
            spent = {name: statistics.median(values) for name, values in timed(runs, 10, device=DEVICE).items()}
            speeds = {name: round(shape.flops() / ms / 1e9, 1) for name, ms in spent.items()}
            found.append({"shape": str(shape), "tflops": speeds, "failed": failed})
            print(json.dumps(found[-1]), flush=True)
    return found


def overhead(tiny: bool) -> dict[str, Any]:
    """A kernel through axattn against the same kernel called directly, forward."""
    found: dict[str, Any] = {}
    for length in (128,) if tiny else (2048, 8192):
        q, k, v = (torch.randn(1, 8, length, 128, device=DEVICE, dtype=BF16) for _ in range(3))
        mask, module = mask_of(Shape(1, 8, 8, length, 128), DEVICE), Attention("varlen")
        runs: dict[str, Run] = {
            "direct": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "axattn": lambda q=q, k=k, v=v, m=mask, a=module: a(q, k, v, m),
        }
        with torch.no_grad():
            spent = timed(runs, 50, device=DEVICE)
        ratio = statistics.median(a / b for a, b in zip(spent["axattn"], spent["direct"], strict=True))
        found[str(length)] = round(ratio, 4)
        print("overhead", length, found[str(length)], flush=True)
        if DEVICE == "cuda":
            found[f"{length} packed"] = _packed_overhead(length)
            print("overhead, packed", length, found[f"{length} packed"], flush=True)
    return found


def _packed_overhead(length: int) -> float:
    """``varlen`` through axattn against ``torch.nn.attention.varlen`` called directly, on the same packed row."""
    from torch.nn.attention.varlen import varlen_attn

    shape = Shape(1, 8, 8, length, 128).packed(16)
    q, k, v = (torch.randn(1, 8, length, 128, device=DEVICE, dtype=BF16) for _ in range(3))
    mask, module = mask_of(shape, DEVICE), Attention("varlen")
    assert mask.segments is not None
    edges, longest = mask.segments.cu_seqlens, max(shape.documents or ())

    def direct() -> torch.Tensor:
        flat = [x[0].transpose(0, 1) for x in (q, k, v)]
        out: torch.Tensor = varlen_attn(*flat, edges, edges, longest, longest, window_size=(-1, 0))
        return out

    with torch.no_grad():
        spent = timed({"direct": direct, "axattn": lambda: module(q, k, v, mask)}, 50, device=DEVICE)
    return round(statistics.median(a / b for a, b in zip(spent["axattn"], spent["direct"], strict=True)), 4)


def masks(tiny: bool) -> dict[str, Any]:
    """Bytes that the masks of one packed forward take: Transformers' own for ``sdpa``, and axattn's."""
    import transformers as tf
    from transformers.masking_utils import create_causal_mask

    import axattn

    axattn.register()
    config = tf.LlamaConfig(hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    found: dict[str, Any] = {}
    for length in (1024,) if tiny else (32768, 131072):
        where = (torch.arange(length, device=DEVICE) % 512)[None]
        embeds = torch.empty(1, length, 64, device=DEVICE, dtype=BF16)
        for name in ("sdpa", "varlen"):
            config._attn_implementation = name
            mask: Any = create_causal_mask(
                config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=where
            )
            layout = mask.layout() if name == "varlen" else None
            held = 0 if layout is not None else mask.numel() * mask.element_size()
            if name == "varlen":
                held = mask.segments.cu_seqlens.numel() * 4
            found[f"{length}, {name}"] = held
    print(json.dumps(found), flush=True)
    return found


def step(tiny: bool) -> list[dict[str, Any]]:
    """A training step of random-weight models, packed, with gradient checkpointing."""
    import transformers as tf

    wide: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
    wide |= {"num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 32768}
    small: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "vocab_size": 128}
    sizes = small if tiny else wide
    layers = ["sliding_attention", "full_attention"] * (int(sizes["num_hidden_layers"]) // 2)
    gemma = {**sizes, "sliding_window": 32 if tiny else 1024, "layer_types": layers}
    qwen = sizes if tiny else {**sizes, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128}
    qwen |= {} if tiny else {"intermediate_size": 6144}
    two_sizes = {"head_dim": 16, "global_head_dim": 32} if tiny else {"head_dim": 256, "global_head_dim": 512}
    two_sizes |= {} if tiny else {"num_attention_heads": 8, "num_key_value_heads": 2, "num_global_key_value_heads": 2}
    configs = {
        "llama": tf.LlamaConfig(**sizes),
        "qwen3": tf.Qwen3Config(**qwen),
        "gemma2 (window, softcap)": tf.Gemma2Config(**gemma),
        "gemma4 (two head dims)": tf.Gemma4TextConfig(**{**gemma, **two_sizes, "hidden_size_per_layer_input": 0}),
    }
    names = ["auto", *(name for name in usable_kernels() if ":" not in name and name != "sdpa"), "flex_attention"]
    found = []
    for family, config in configs.items():
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(DEVICE, BF16).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for tokens in (256,) if tiny else (8192, 32768):
            entry = {"model": family, "tokens": tokens, "steps": bench_step(model, names, tokens=tokens, documents=16)}
            print(json.dumps(entry), flush=True)
            found.append(entry)
    return found


def quantiser(tiny: bool) -> list[dict[str, Any]]:
    """Queries, keys less their mean, and values to fp8, as `fp8` has them: axattn's kernels, torchao's, torch's passes.

    Gigabytes a second are those that it takes in two readings: 16 bit twice, 8 bit out, smoothed keys out.
    """
    from axattn.backends import fp8
    from axattn.kernels import fp8_quantiser
    from axattn.kernels.document_statistics import Documents, smoothed
    from axattn.masks.varlen_layout import Layout, Span

    def of_torch(x: torch.Tensor, documents: Documents, heads: int) -> torch.Tensor:
        peak = torch.linalg.vector_norm(x, float("inf"), dim=-1, dtype=torch.float32)
        peak = torch.segment_reduce(peak, "max", lengths=torch.tensor(documents.lengths, device=x.device), axis=0)
        scale = 448 / peak.unflatten(1, (heads, -1)).amax(-1).clamp(min=fp8_quantiser.SMALLEST)
        spread = documents.spread(scale).repeat_interleave(x.shape[1] // heads, 1)
        return (x.float() * spread[..., None]).to(torch.float8_e4m3fn)

    found = []
    for lengths in ((40, 24),) if tiny else ((2048,) * 8, (512,) * 128, (65536,), (8192,) * 8):
        tokens, size, heads, kv_heads = sum(lengths), 64 if tiny else 128, 2 if tiny else 32, 1 if tiny else 8
        q, k, v = (torch.randn(tokens, h, size, device=DEVICE, dtype=BF16) for h in (heads, kv_heads, kv_heads))
        documents = Documents(lengths, q.device)
        layout = Layout(
            (Span(0, len(lengths), 0, lengths[0], 0, lengths[0]),), True, None, len(lengths), *lengths[:1] * 2
        )

        def run_axattn(q: Any = q, k: Any = k, v: Any = v, documents: Any = documents, heads: int = kv_heads) -> None:
            fp8_quantiser.quantise(q, documents, heads)
            fp8_quantiser.quantise_smoothed(k, documents)
            fp8_quantiser.quantise(v, documents, heads)

        def run_torch(q: Any = q, k: Any = k, v: Any = v, documents: Any = documents, heads: int = kv_heads) -> None:
            for x in (q, smoothed(k, documents), v):
                of_torch(x, documents, heads)

        def run_torchao(q: Any = q, k: Any = k, v: Any = v, documents: Any = documents, layout: Any = layout) -> None:
            fp8.quantised_rows(q, fp8_quantiser.smoothed(k, documents), v, layout)

        runs: dict[str, Run] = {"ours": run_axattn, "torch": run_torch}
        if len(set(lengths)) == 1:
            runs["torchao"] = run_torchao  # whole rows only; a first call tunes it
        runs, failed = working(runs)
        spent = {name: statistics.median(values) for name, values in timed(runs, 20, device=DEVICE).items()}
        moved = q.numel() * 5 + k.numel() * 7 + v.numel() * 5
        entry: dict[str, Any] = {"documents": list(lengths), "ms": {n: round(ms, 4) for n, ms in spent.items()}}
        entry |= {"GB/s": {n: round(moved / ms / 1e6) for n, ms in spent.items()}, "failed": failed}
        print(json.dumps(entry), flush=True)
        found.append(entry)
    return found


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=["overhead", "step", "attention", "torch", "masks", "quantiser"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU: a test of this script")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        parser.error("no GPU here; --tiny runs small shapes on a CPU")
    from axattn.machine.environment import Environment

    result: dict[str, Any] = {"machine": {**machine(), **Environment.current().to_dict()}}
    result["matmul_tflops"] = round(matmul_tflops(DEVICE, BF16, 256 if arguments.tiny else None), 1)
    print(json.dumps(result), flush=True)
    parts: dict[str, Callable[[bool], Any]] = {
        "attention": attention,
        "torch": own_kernels,
        "overhead": overhead,
        "step": step,
        "masks": masks,
        "quantiser": quantiser,
    }
    for name in arguments.only:
        result[name] = parts[name](arguments.tiny)
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
