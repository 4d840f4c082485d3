"""Kernels side by side on one GPU, in one command: ``python -m benchmarks.gpu [--output FILE] [--only PART ...]``.

Parts: attention (forward, and with backward; dense and packed; TFLOP/s, share of the measured matmul peak, error),
overhead (through axattn against the kernel called directly), step (a training step of a 1B-type LLaMA and a Gemma-type
model), masks (memory). It prints as it goes. ``--tiny`` runs small shapes, on a CPU too: a test of the script.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import axattn
from axattn import backends
from axattn.environment import Environment
from axattn.interface import attend
from axattn.masking import lazy_mask
from axattn.masks import LazyMask
from axattn.routes import ATTRIBUTE, Route
from axattn.segments import Segments
from benchmarks.measure import machine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = (
    "varlen",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "xformers",
    "sage",
    "sage:library",
    "fp8",
)
Run = Callable[[], object]


def timed(candidates: dict[str, Run], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each call, in turn; by CUDA events on a GPU."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, run in candidates.items():
            if DEVICE == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                spent = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                run()
                spent = (time.perf_counter() - begin) * 1e3
            if turn >= warmup:
                times[name].append(spent)
    return times


def working(candidates: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates that run, and why the others don't."""
    runs, failed = {}, {}
    for name, run in candidates.items():
        try:
            run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            runs[name] = run
        except Exception as error:  # a benchmark goes on: the reason is part of its result
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return runs, failed


def usable() -> list[str]:
    """The kernels that this machine runs."""
    return [name for name in KERNELS if not backends.get(name).probe(Environment.current())]


class Attention(torch.nn.Module):
    """An attention module on one kernel."""

    is_causal = True

    def __init__(self, kernel: str) -> None:
        super().__init__()
        name = kernel.split(":", maxsplit=1)[0]
        self.name = name
        self.__dict__[ATTRIBUTE] = Route(name, kernel, (kernel,), kernel)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: LazyMask) -> torch.Tensor:
        """``[B, S, H, D]``."""
        return attend(self.name, self, q, k, v, mask)[0]


def lengths_of(tokens: int, mean: int, seed: int = 0) -> list[int]:
    """Document lengths from a log-normal distribution that add up to `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while (left := tokens - sum(found)) > 0:
        drawn = int(math.exp(math.log(mean) + 0.8 * float(torch.randn(1, generator=generator))))
        found.append(min(max(drawn, 16), left))
    return found


def mask_of(rows: int, length: int, documents: list[int] | None) -> LazyMask:
    """The mask of dense rows, or of one packed row."""
    mask = lazy_mask(rows, length, length, device=DEVICE)
    mask.guarded = True
    if documents is None:
        return mask
    edges = [0]
    for size in documents:
        edges.append(edges[-1] + size)
    return mask.with_segments(Segments((tuple(edges),), torch.device(DEVICE)))


def matmul_peak(tiny: bool) -> float:
    """TFLOP/s of a large bf16 matrix product, measured."""
    size = 256 if tiny else 8192
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = min(timed({"matmul": lambda: a @ b}, 10)["matmul"])
    return 2 * size**3 / best / 1e9


def direct_sdpa(backend: str, q: Any, k: Any, v: Any) -> Callable[[], torch.Tensor]:
    """One of torch's own dense kernels, called directly."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run() -> torch.Tensor:
        with sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def attention(tiny: bool, peak: float) -> list[dict[str, Any]]:
    """Every kernel on dense and packed causal attention, GQA 4:1, bf16."""
    found = []
    sizes = (128, 256) if tiny else (2048, 8192, 32768)
    heads, kv_heads = (4, 1) if tiny else (32, 8)
    for dim in (64,) if tiny else (64, 128):
        for length in sizes:
            for packed in (False, True):
                rows = 1 if packed else max(1, (256 if tiny else 16384) // length)
                documents = lengths_of(length, max(length // 16, 32)) if packed else None
                entry = one_shape(rows, length, dim, heads, kv_heads, documents, peak)
                print(json.dumps(entry), flush=True)
                found.append(entry)
    return found


def one_shape(
    rows: int, length: int, dim: int, heads: int, kv_heads: int, documents: list[int] | None, peak: float
) -> dict[str, Any]:
    """All kernels on one shape."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(rows, h, length, dim, device=DEVICE, dtype=torch.bfloat16) for h in (heads, kv_heads, kv_heads)
    )
    # memory as a model lays it out: [B, S, H, D]
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    target = torch.randn(rows, length, heads, dim, device=DEVICE, dtype=torch.bfloat16)
    mask = mask_of(rows, length, documents)
    modules = {name: Attention(name) for name in usable()}

    def through(name: str) -> Callable[[], torch.Tensor]:
        return lambda: modules[name](q, k, v, mask)

    makers: dict[str, Callable[[], torch.Tensor]] = {name: through(name) for name in modules}
    if documents is None:
        for label, backend in (("sdpa flash", "FLASH_ATTENTION"), ("sdpa cudnn", "CUDNN_ATTENTION")):
            makers[label] = direct_sdpa(backend, q, k, v)
        makers["sdpa efficient"] = direct_sdpa("EFFICIENT_ATTENTION", q, k, v)

    def forward(make: Callable[[], torch.Tensor]) -> Run:
        def run() -> None:
            with torch.no_grad():
                make()

        return run

    def both(make: Callable[[], torch.Tensor]) -> Run:
        def run() -> None:
            out = make()
            torch.autograd.grad(out, (q, k, v), target if out.shape == target.shape else target.transpose(1, 2))

        return run

    pairs = [n * n for n in (documents or [length] * rows)]
    flops = 4 * heads * dim * sum(pairs) / 2
    entry: dict[str, Any] = {"B": rows, "S": length, "D": dim, "H": heads, "Hkv": kv_heads}
    entry["documents"] = None if documents is None else len(documents)
    for label, wrap, times_flops in (("forward", forward, 1.0), ("forward+backward", both, 3.5)):
        runs, failed = working({name: wrap(make) for name, make in makers.items()})
        spent = timed(runs, 10 if length < 32768 else 5)
        base = statistics.median(spent["varlen"])
        entry[label] = {
            name: {
                "ms": round(statistics.median(values), 4),
                "spread": round((max(values) - min(values)) / statistics.median(values), 3),
                "speedup": round(base / statistics.median(values), 3),
                "tflops": round(flops * times_flops / statistics.median(values) / 1e9, 1),
                "of_peak": round(flops * times_flops / statistics.median(values) / 1e9 / peak, 3),
            }
            for name, values in spent.items()
        }
        if failed:
            entry[f"{label}, failed"] = failed
    if length <= 8192:
        entry["error"] = errors(makers, q, k, v, documents)
    return entry


@torch.no_grad()
def errors(makers: dict[str, Any], q: Any, k: Any, v: Any, documents: list[int] | None) -> dict[str, float]:
    """Relative error of the outputs against fp32 attention on each document."""
    parts, start = [], 0
    for size in documents or [q.shape[2]]:
        piece = (x[:1, :, start : start + size].float() for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*piece, is_causal=True, enable_gqa=True).transpose(1, 2))
        start += size
    wanted = torch.cat(parts, 1)
    found = {}
    for name, run in working(makers)[0].items():
        out = run()
        out = out if out.shape[2] == q.shape[1] else out.transpose(1, 2)  # type: ignore[attr-defined]
        found[name] = round(((out[:1].float() - wanted).norm() / wanted.norm()).item(), 5)
    return found


def overhead(tiny: bool) -> dict[str, Any]:
    """A kernel through axattn against the same kernel called directly."""
    found: dict[str, Any] = {}
    for length in (128,) if tiny else (2048, 8192):
        q, k, v = (torch.randn(1, 8, length, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        mask, module = mask_of(1, length, None), Attention("varlen")
        runs: dict[str, Run] = {
            "direct": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "axattn": lambda q=q, k=k, v=v, m=mask, a=module: a(q, k, v, m),
        }
        with torch.no_grad():
            spent = timed(runs, 50)
        ratio = statistics.median(a / b for a, b in zip(spent["axattn"], spent["direct"], strict=True))
        found[str(length)] = round(ratio, 4)
        print("overhead", length, found[str(length)], flush=True)
    return found


def step(tiny: bool) -> list[dict[str, Any]]:
    """A training step of random-weight models, packed: tokens a second and peak memory."""
    import transformers as tf

    wide: dict[str, Any] = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32}
    wide |= {"num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 8192, "vocab_size": 32768}
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"head_dim": 16, "intermediate_size": 64, "vocab_size": 128}
    sizes = small if tiny else wide
    layers = ["sliding_attention", "full_attention"] * (int(sizes["num_hidden_layers"]) // 2)
    gemma = {**sizes, "sliding_window": 32 if tiny else 1024, "layer_types": layers, "attention_dropout": 0.0}
    models = {"llama": tf.LlamaConfig(**sizes), "gemma2": tf.Gemma2Config(**gemma)}
    found = []
    for family, config in models.items():
        for tokens in (256,) if tiny else (8192, 32768):
            entry = {"model": family, "tokens": tokens, **one_step(config, tokens)}
            print(json.dumps(entry), flush=True)
            found.append(entry)
    return found


def one_step(config: Any, tokens: int) -> dict[str, Any]:
    """Every name on one model."""
    import transformers as tf

    documents = lengths_of(tokens, max(tokens // 16, 32))
    where = torch.cat([torch.arange(n) for n in documents])[None].to(DEVICE)
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=DEVICE)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).to(DEVICE, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found: dict[str, Any] = {"documents": len(documents)}
    for name in ("sdpa", "auto", *usable()):
        if ":" in name:
            continue
        try:
            if name == "sdpa":  # Transformers' own: right only without a cache
                axattn.restore(model)
                model.set_attn_implementation("sdpa")
            else:
                axattn.apply(model, name, on_unsupported="raise")

            def run() -> None:
                loss = model(ids, labels=ids, position_ids=where, use_cache=False).loss
                loss.backward()
                model.zero_grad(set_to_none=True)

            run()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            spent = statistics.median(timed({name: run}, 3, 1)[name])
            peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0
            found[name] = {"tokens_per_s": round(tokens / spent * 1e3), "peak_gib": round(peak, 2)}
        except Exception as error:  # a benchmark goes on: the reason is part of its result
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found


def masks(tiny: bool) -> dict[str, Any]:
    """Bytes of a packed row's mask: ours, and the dense one that Transformers would build."""
    found = {}
    for length in (256,) if tiny else (32768, 131072):
        documents = lengths_of(length, 512)
        mask = mask_of(1, length, documents)
        assert mask.layout() is not None
        found[str(length)] = {"dense_bytes": length * length, "spans": len(documents)}
    return found


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=["attention", "overhead", "step", "masks"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, also on a CPU: a test of this script")
    arguments = parser.parse_args()
    if DEVICE == "cpu" and not arguments.tiny:
        parser.error("no GPU here; --tiny runs small shapes on a CPU")
    result: dict[str, Any] = {"machine": {**machine(), **Environment.current().to_dict()}}
    peak = matmul_peak(arguments.tiny)
    result["matmul_tflops"] = round(peak, 1)
    print(json.dumps(result), flush=True)
    parts: dict[str, Callable[[], Any]] = {
        "attention": lambda: attention(arguments.tiny, peak),
        "overhead": lambda: overhead(arguments.tiny),
        "step": lambda: step(arguments.tiny),
        "masks": lambda: masks(arguments.tiny),
    }
    for name in arguments.only:
        result[name] = parts[name]()
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
