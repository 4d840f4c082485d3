"""The training stack on a CPU: a Trainer's whole step, rows over two processes, compilation."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from benchmarks.measure import interleaved, ratios
from benchmarks.models import llama, packed, step


class _Timed:
    """Seconds inside the attention function of a model, forward only."""

    def __init__(self, model: Any) -> None:
        self.seconds = 0.0
        self.start = 0.0
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._begin)
            layer.self_attn.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.start


def trainer_step() -> dict[str, Any]:
    """Packed tokens a second of Transformers' Trainer (optimizer included), on ``varlen`` against ``sdpa``.

    The attention part is the time inside the attention modules in the forward, projections included.
    """
    import tempfile

    import torch
    from transformers import Trainer, TrainingArguments

    import axattn

    torch.set_num_threads(2)
    documents = [{"input_ids": torch.randint(3, 8192, (256,)).tolist()} for _ in range(64)]

    def trainer(model: Any, folder: str) -> Any:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
        )
        return Trainer(model, arguments, train_dataset=documents, data_collator=axattn.PackingCollator(4096))

    stock = llama(384, 8, 6, 8192)
    on_axattn = copy.deepcopy(stock)
    stock.set_attn_implementation("sdpa")
    axattn.prepare_for_training(axattn.apply(on_axattn, "varlen"))
    stock.config.use_cache = False
    timed = {"sdpa": _Timed(stock), "varlen": _Timed(on_axattn)}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {"sdpa": trainer(stock, folder), "varlen": trainer(on_axattn, folder)}
        batch = axattn.PackingCollator(4096)(documents[:16])
        if batch["input_ids"].shape != (1, 4096):
            raise AssertionError(f"the benchmark's batch is {batch['input_ids'].shape}, not one row of 4096")
        runs: dict[str, Callable[[], object]] = {}
        for name, one in trainers.items():
            one.create_optimizer_and_scheduler(10)
            one.current_gradient_accumulation_steps = 1  # what its loop sets before a step
            runs[name] = _trainer_step(one, batch)
        times = interleaved(runs, 4, 1)
    return {
        "row": "4096 tokens in 16 documents, 20 M LLaMA, AdamW",
        "whole step, speedup": round(1 / ratios(times, "sdpa")["varlen"]["ratio"], 3),
        "attention modules, forward, speedup": round(timed["sdpa"].seconds / timed["varlen"].seconds, 3),
        "tokens a second": {name: round(4096 / min(each)) for name, each in times.items()},
        "aim": "attention part >= 1.5",
    }


def _trainer_step(trainer: Any, batch: dict[str, Any]) -> Callable[[], object]:
    def run() -> None:
        trainer.model.train()
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.model.zero_grad()

    return run


def _two_processes(tokens: int, rounds: int) -> dict[str, float]:
    """In each of two ranks, one thread each: seconds of a step on whole rows, on split rows, and of the exchanges."""
    import torch
    import torch.distributed as dist

    import axattn

    torch.set_num_threads(1)
    model = llama(384, 4, 6, 1024)
    models = {name: copy.deepcopy(model) for name in ("whole", *_STRATEGIES)}
    for name, one in models.items():
        axattn.apply(one.train(), "varlen")
        if name in _STRATEGIES:
            axattn.sequence_parallel(one, dist.group.WORLD, strategy=_STRATEGIES[name])
    batch = packed(tokens, tokens // 512, 1024)
    batch["use_cache"] = False
    spent = dict.fromkeys(models, 0.0)
    real, running = dist.all_to_all_single, ""

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        out = real(*args, **options)
        spent[running] += time.perf_counter() - start
        return out

    def stepped(name: str) -> Callable[[], object]:
        run = step(models[name], batch)

        def one() -> None:
            nonlocal running
            running = name
            run()

        return one

    dist.all_to_all_single = timed
    times = interleaved({name: stepped(name) for name in models}, rounds, 1)
    dist.all_to_all_single = real
    found = {f"{name}: against whole": ratios(times, "whole")[name]["ratio"] for name in _STRATEGIES}
    return found | {f"{name}: share of exchange": spent[name] / (rounds + 1) / min(times[name]) for name in _STRATEGIES}


_STRATEGIES: dict[str, Any] = {"exchanging heads": "ulysses", "fetching keys": "fetch"}


def rows_over_ranks() -> dict[str, Any]:
    """A step with rows over two processes (gloo, one thread each) against one process that runs them whole."""
    from tests.distributed import run

    found: dict[str, Any] = {"ideal": 0.5, "documents": 512}
    for tokens in (1024, 4096):
        ranks = run(2, _two_processes, tokens, 3)
        for name in _STRATEGIES:
            keys = ("against whole", "share of exchange")
            found[f"{tokens:,} tokens, {name}"] = {
                key: round(max(rank[f"{name}: {key}"] for rank in ranks), 3) for key in keys
            }
    return found


def compilation() -> dict[str, Any]:
    """Seconds of the first compiled step (inductor) and graphs made over six lengths, whole model and layers."""
    import torch
    from torch._dynamo.backends.registry import lookup_backend

    import axattn

    found: dict[str, Any] = {"model": "4 layers of 192"}
    warm = torch.compile(llama(64, 1, 2, 128).train())  # the compiler's own first time is nobody's
    step(warm, {"input_ids": torch.zeros(1, 8, dtype=torch.long), "labels": torch.zeros(1, 8, dtype=torch.long)})()
    for name in ("varlen", "sdpa"):
        for what in ("model", "layers"):
            torch._dynamo.reset()
            graphs = 0

            def counted(graph: Any, inputs: Any) -> Any:
                nonlocal graphs
                graphs += 1
                return lookup_backend("inductor")(graph, inputs)

            model = llama(192, 4, 6, 1024).train()
            if name == "sdpa":
                model.set_attn_implementation("sdpa")
            else:
                axattn.apply(model, name)
            runs: Any = model
            if what == "model":
                runs = torch.compile(model, backend=counted)
            else:
                for layer in model.model.layers:
                    layer.compile(backend=counted)
            seconds = []
            for length in (256, 320, 512, 448, 640, 384):
                batch = packed(length, 4, 1024) if name != "sdpa" else _dense(length)
                start = time.perf_counter()
                step(runs, batch)()
                seconds.append(time.perf_counter() - start)
            found[f"{name}, {what}"] = {
                "graphs over six lengths": graphs,
                "first step, seconds": round(seconds[0], 2),
                "last step, seconds": round(seconds[-1], 3),
            }
    return found


def _dense(length: int) -> dict[str, Any]:
    return {key: value for key, value in packed(length, 1, 1024).items() if key != "position_ids"}
