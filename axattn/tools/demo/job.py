"""The demo's job: load, fine-tune packed with Transformers' Trainer, prove, save, reload without axattn, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

import axattn
from axattn.tools.demo.corpus import documents, tokenise, train_tokenizer
from axattn.tools.demo.loss import ends, plot
from axattn.tools.demo.proof import Proof, no_leak, packed_equals_alone
from axattn.tools.rows import Rows
from axattn.tools.tables import print_plan

ROW = 1024
BATCH = 16
PROMPT = "def "
_STEPS_TO_FALL = 40
"""From this many steps on the loss must fall by a tenth; in fewer, at all."""


def run(output: Path, attn: str, steps: int, seed: int) -> bool:
    """Run the demo and write everything to `output`. Returns whether a proof failed."""
    with tempfile.TemporaryDirectory(prefix="axattn-demo-") as scratch:
        return _run(output, Path(scratch), attn, steps, seed)


def _run(output: Path, scratch: Path, attn: str, steps: int, seed: int) -> bool:
    console = Console()
    start = time.perf_counter()
    set_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    fresh, tuned = scratch / "fresh-model", output / "model"

    texts, tokenizer, examples = build_corpus(Console(stderr=True))
    tokens = sum(len(example["input_ids"]) for example in examples)
    console.print(f"{len(texts)} functions of Python's library, {tokens:,} tokens")
    _make_model(tokenizer, fresh)

    model = axattn.from_pretrained(fresh, attn_implementation=attn)
    console.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    plan = axattn.plan(model, attn)
    print_plan(plan, console, seq_len=ROW)

    collator = axattn.PackingCollator(max_length=ROW, pad_token_id=tokenizer.pad_token_id)
    held, train = examples[:BATCH], examples[BATCH:]
    losses = _train(model, train, collator, scratch, steps, seed)
    console.print(
        f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps; rows {100 * collator.stats.fill:.1f} % full, "
        f"{collator.stats.documents} documents, {collator.stats.splits} cuts"
    )
    console.print(str(axattn.status(model)))

    proofs = _prove(model, tokenizer, held, tuned, losses)
    text, stock_text = _generate_both(model, tokenizer, tuned)
    proofs.append(
        Proof("stock Transformers, without axattn, generates the same tokens", float(text != stock_text), 0.0)
    )
    _print_proofs(console, proofs)
    console.print(f"{PROMPT!r} continues: {text!r}")

    plot(losses, output / "loss.png")
    report = {
        "asked": attn,
        "plan": plan.to_dict(),
        "losses": [round(loss, 5) for loss in losses],
        "proofs": [{**asdict(proof), "holds": proof.holds} for proof in proofs],
        "packing": {**asdict(collator.stats), "fill": round(collator.stats.fill, 4)},
        "generated": text,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"{report['seconds']} s; wrote {output}/report.json, {output}/loss.png and {output}/model")
    return not all(proof.holds for proof in proofs)


def build_corpus(console: Console) -> tuple[list[str], Any, list[dict[str, list[int]]]]:
    """The documents, a tokenizer trained on them, and the examples, with a progress bar on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading Python's library", total=None)
        texts = documents(progress=lambda done, total: bar.update(task, completed=done, total=total))
        bar.update(task, description="training a tokenizer", total=None)
        tokenizer = train_tokenizer(texts)
        bar.update(task, description="tokenising", completed=0, total=len(texts))
        examples = []
        for at in range(0, len(texts), 100):
            examples += tokenise(texts[at : at + 100], tokenizer)
            bar.update(task, completed=len(examples))
    return texts, tokenizer, examples


def _make_model(tokenizer: Any, folder: Path) -> None:
    """Save a small LLaMA with random weights as a checkpoint."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=ROW,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class _Progress(ProgressCallback):  # type: ignore[misc]  # Transformers ships no types
    """Transformers' progress bar, showing the loss instead of printing a line for every logged step."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Called by the Trainer with its logs."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            if self.training_bar is not None:
                self.training_bar.set_postfix(loss=f"{self.losses[-1]:.3f}")


def _train(model: Any, train: list[Any], collator: Any, scratch: Path, steps: int, seed: int) -> list[float]:
    axattn.prepare_for_training(model)
    progress = _Progress()
    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1.2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 20, 1),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=False,
    )
    trainer = Trainer(model, arguments, train_dataset=train, data_collator=collator)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    trainer.train()
    return progress.losses


def _prove(model: Any, tokenizer: Any, held: list[Any], tuned: Path, losses: list[float]) -> list[Proof]:
    """The proofs on held-out documents, with the tuned weights that stock Transformers will load."""
    model.eval()
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    reference = LlamaForCausalLM.from_pretrained(tuned, attn_implementation="eager").to(model.device).eval()
    collator = axattn.PackingCollator(max_length=ROW, pad_token_id=tokenizer.pad_token_id)
    batch = collator([{"input_ids": example["input_ids"][: ROW // 2]} for example in held])
    batch = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in batch.items()}
    first, last = ends(losses)
    limit = 0.9 if len(losses) >= _STEPS_TO_FALL else 0.99
    fell = Proof("the loss fell (last five steps over the first five)", last / first, limit)
    return [fell, no_leak(model, batch), *packed_equals_alone(model, reference, batch)]


_STOCK = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
out = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=24, do_sample=False)
assert "axattn" not in sys.modules
print(json.dumps(tokenizer.decode(out[0], skip_special_tokens=True)))
"""


def _generate_both(model: Any, tokenizer: Any, tuned: Path) -> tuple[str, str]:
    """Greedy tokens from the model, and from stock Transformers in a process without axattn (``AXATTN_AUTOLOAD=0``)."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    command = [sys.executable, "-c", _STOCK, str(tuned), PROMPT]
    alone = os.environ | {"AXATTN_AUTOLOAD": "0"}
    stock = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    if stock.returncode:
        raise RuntimeError(f"stock Transformers could not load the saved model:\n{stock.stderr}")
    return tokenizer.decode(out[0], skip_special_tokens=True), json.loads(stock.stdout.strip().splitlines()[-1])


def _print_proofs(console: Console, proofs: list[Proof]) -> None:
    table = Rows("claim", "measured", "at most", "holds", title="Proofs")
    for proof in proofs:
        holds = Text("yes", "green") if proof.holds else Text("NO", "red")
        table.add(proof.claim, f"{proof.error:.2g}", f"{proof.limit:.2g}", holds)
    console.print(table)
