"""Every kernel of the table on a real GPU: ``pytest -m gpu``; a row skips with the reason why it can't run here.

``AXATTN_GPU_TESTS_ON=cpu`` runs the same tests over the strict fakes, to check the tests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch

import axattn
from axattn import backends
from axattn.machine.environment import Environment
from tests.models import build, positions, tokens

pytestmark = pytest.mark.gpu
Run = Callable[[Any], torch.Tensor]
DEVICE = os.environ.get("AXATTN_GPU_TESTS_ON", "cuda")
EXACT = ("varlen", "flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "flex_attention", "sdpa")
LOSSY = ("sage", "sage:library", "fp8")
ROWS = (*EXACT, *LOSSY)
FAKED = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers", "sage", "fp8")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 1024}
LENGTHS = ((70, 130, 33, 23), (200, 56))
SLACK, FLOOR = 1.5, 2e-3
"""A kernel in bf16 may be this much further from fp32 than Transformers' eager in bf16 is (relative error of norms)."""
BUDGET = 0.15
"""A lossy kernel in a model of two layers, whose errors the layers around it add to."""


@pytest.fixture(params=ROWS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    name = request.param
    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu" and name in FAKED:
            from tests.fakes.machine import hopper

            stack.enter_context(hopper(name))
            stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                "tests.fakes.torchao.STORAGE", torch.float8_e4m3fn
            )
        reasons = backends.get(name).probe(Environment.current())
        if reasons:
            pytest.skip(f"{name}: {'; '.join(reason.text for reason in reasons)}")
        if DEVICE == "cpu" and name == "flex_attention":
            pytest.skip("flex_attention on a CPU has no gradient")
        yield name


def require_window(name: str) -> None:
    """Skip where the kernel as installed here has no sliding window."""
    if not backends.get(name).capability_on(Environment.current()).window:
        pytest.skip(f"{name} has no sliding window with the libraries of this machine")


def allowed(name: str, half: float) -> float:
    """The error that a kernel may have where eager in bf16 has `half`."""
    return BUDGET if name in LOSSY else SLACK * half + FLOOR


def made(family: str, **options: Any) -> Any:
    """The family's model with logits of a few units; `build` makes them so sharp here that rounding rules."""
    model = build(family, **SIZES, **options)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data.div_(16)
    return model


def model_of(family: str, name: str, **options: Any) -> Any:
    """The family's model in bf16 on a kernel."""
    model = made(family, **options).to(DEVICE).to(torch.bfloat16)
    return on(model, name)


def on(model: Any, name: str) -> Any:
    """A model on a row of the table: a name, or ``name:provider``."""
    asked, _, provider = name.partition(":")
    options = {"provider": provider} if provider else {"provider": "triton"} if name == "sage" else None
    return axattn.apply(model, asked, upgrade_flash=False, kernel_options=options)


def eager_of(family: str, dtype: torch.dtype, **options: Any) -> Any:
    """The same weights, rounded to bf16 alike, on eager."""
    model = made(family, **options).to(torch.bfloat16).to(dtype).to(DEVICE)
    model.set_attn_implementation("eager")
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def compare(family: str, kernel: str, found: Run, expected: Run, **options: Any) -> None:
    """Outputs and the gradients of every projection: no further from fp32 eager than eager in bf16, but for `SLACK`."""
    if options.get("sliding_window"):
        require_window(kernel)
    results = []
    for model, run in (
        (eager_of(family, torch.float32, **options), expected),
        (eager_of(family, torch.bfloat16, **options), expected),
        (model_of(family, kernel, **options), found),
    ):
        out = run(model)
        target = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        (out.float() * target).sum().backward()
        taken = {n: p.grad for n, p in model.named_parameters() if "_proj" in n and "self_attn" in n}
        results.append({"logits": out.detach(), **taken})
    exact, half, outputs = results
    for name, wanted in exact.items():
        assert outputs[name] is not None, name
        assert torch.isfinite(outputs[name]).all(), name
        assert relative(outputs[name], wanted) < allowed(kernel, relative(half[name], wanted)), name


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_forward_and_gradients_against_fp32_eager(kernel: str, family: str, side: str) -> None:
    window = {"sliding_window": 20} if family == "mistral" else {}
    ids, mask = tokens(2, 128).to(DEVICE), torch.ones(2, 128, dtype=torch.long, device=DEVICE)
    mask[1, slice(0, 50) if side == "left" else slice(78, 128)] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    real = mask.bool()

    def run(model: Any) -> torch.Tensor:
        return model(ids, attention_mask=mask, position_ids=where, use_cache=False).logits[real]

    compare(family, kernel, run, run, **window)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("rows", [1, 2])
def test_packed_forward_and_gradients_against_documents_alone(kernel: str, family: str, rows: int) -> None:
    window = {"sliding_window": 20} if family == "mistral" else {}
    ids, where = tokens(rows, 256).to(DEVICE), positions(*LENGTHS[:rows]).to(DEVICE)

    def packed(model: Any) -> torch.Tensor:
        return model(ids, position_ids=where, use_cache=False).logits.flatten(0, 1)

    def alone(model: Any) -> torch.Tensor:
        parts = []
        for row, lengths in enumerate(LENGTHS[:rows]):
            for part in ids[row].split(lengths):
                parts.append(model(part[None], use_cache=False).logits[0])
        return torch.cat(parts)

    compare(family, kernel, packed, alone, **window)


@pytest.mark.parametrize("described", ["packed", "padded"])
def test_a_compiled_step_against_eager(kernel: str, described: str) -> None:
    """Inside a graph a kernel's forward and backward are apart (`axattn.backends.varlen_engine.forward_backward`), or
    it runs twice."""
    if kernel not in ("varlen", "sdpa", "xformers", *LOSSY):
        pytest.skip(f"Transformers runs {kernel}")
    torch._dynamo.reset()
    if described == "packed":
        ids, where = tokens(2, 256).to(DEVICE), positions(*LENGTHS).to(DEVICE)
        documents = [ids[r, a:b] for r, row in enumerate(LENGTHS) for a, b in pairwise(accumulate(row, initial=0))]
        given, real = {"position_ids": where}, torch.ones_like(ids).bool()
    else:
        ids, mask = tokens(2, 128).to(DEVICE), torch.ones(2, 128, dtype=torch.long, device=DEVICE)
        mask[1, 78:] = 0
        documents, given, real = [ids[0], ids[1, :78]], {"attention_mask": mask}, mask.bool()

    def found(model: Any) -> torch.Tensor:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        return compiled(ids, use_cache=False, **given).logits[real]

    def expected(model: Any) -> torch.Tensor:
        return torch.cat([model(document[None]).logits[0] for document in documents])

    compare("llama", kernel, found, expected)


def test_a_changed_document_leaves_the_others_as_they_were(kernel: str) -> None:
    model = model_of("llama", kernel)
    ids, where = tokens(1, 256).to(DEVICE), positions(LENGTHS[0]).to(DEVICE)
    changed = ids.clone()
    changed[0, 100] = 5
    with torch.no_grad():
        a, b = (model(x, position_ids=where, use_cache=False).logits[0] for x in (ids, changed))
    assert torch.equal(a[:70], b[:70])
    assert torch.equal(a[200:], b[200:])
    assert not torch.equal(a[100:200], b[100:200])


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_of_a_left_padded_batch_stays_close_to_eager(kernel: str, family: str) -> None:
    window = {"sliding_window": 20} if family == "mistral" else {}
    if window:
        require_window(kernel)
    exact, half = (eager_of(family, dtype, **window) for dtype in (torch.float32, torch.bfloat16))
    ids, mask = tokens(2, 40).to(DEVICE), torch.ones(2, 40, dtype=torch.long, device=DEVICE)
    mask[1, :15] = 0
    forced = tokens(2, 12, seed=9).to(DEVICE)
    logits = []
    for each in (exact, half, model_of(family, kernel, **window)):
        out = each(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=True)
        cache, seen, steps = out.past_key_values, mask, [out.logits[:, -1]]
        for step in range(forced.shape[1]):  # the same tokens for both: a sampled one could part their ways
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            out = each(
                forced[:, step : step + 1],
                attention_mask=seen,
                position_ids=seen.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(out.logits[:, -1])
        logits.append(torch.stack(steps))
    assert relative(logits[2], logits[0]) < allowed(kernel, relative(logits[1], logits[0]))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_twenty_steps_of_training_follow_the_exact_run(kernel: str, lora: bool, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(5)
    corpus = [{"input_ids": torch.randint(3, 97, (int(n),), generator=generator).tolist()} for n in range(5, 165)]
    losses = {}
    for name in ("varlen", kernel):
        model: Any = on(made("llama").to(DEVICE), name)
        if lora:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        axattn.prepare_for_training(model)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name.replace(":", "-")),
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            optim="sgd",
            bf16=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            seed=1,
            use_cpu=DEVICE == "cpu",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=corpus, data_collator=axattn.PackingCollator(256))
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[kernel] == pytest.approx(losses["varlen"], rel=5e-2 if kernel in LOSSY else 2e-2)


def test_second_derivatives_are_refused(kernel: str) -> None:
    """By axattn, or (``sdpa``) by torch's own kernels."""
    model = model_of("llama", kernel)
    embeds = model.get_input_embeddings()(tokens(1, 256).to(DEVICE)).detach().requires_grad_()
    where = positions(LENGTHS[0]).to(DEVICE)
    loss = model(inputs_embeds=embeds, position_ids=where, use_cache=False).logits.float().square().mean()

    def penalty() -> Any:
        (gradient,) = torch.autograd.grad(loss, embeds, create_graph=True)
        return torch.autograd.grad(gradient.float().square().sum(), embeds)

    with pytest.raises((axattn.UnsupportedAttentionError, RuntimeError), match=r"create_graph=True|not implemented"):
        penalty()


@torch.no_grad()
@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4", "xformers"])
def test_gemma_4_in_a_mixed_plan(name: str) -> None:
    from tests.conformance.families import FAMILIES

    with contextlib.ExitStack() as stack:
        if DEVICE == "cpu":
            from tests.fakes.machine import hopper

            stack.enter_context(hopper(name))
        reasons = backends.get(name).probe(Environment.current())
        if reasons:
            pytest.skip(f"{name}: {'; '.join(reason.text for reason in reasons)}")
        model = FAMILIES["gemma4"].make().to(torch.bfloat16).to(DEVICE)
        axattn.apply(model, name, on_unsupported="route")
        ids = tokens(1, 18).to(DEVICE)
        found = model(ids, position_ids=positions((7, 11)).to(DEVICE), use_cache=False).logits
        served = [set(layer.served) for layer in axattn.status(model).layers]
    assert served == [{name}, {"varlen"}] * 2
    alone = []
    for dtype in (torch.float32, torch.bfloat16):
        eager = FAMILIES["gemma4"].make().to(torch.bfloat16).to(dtype).to(DEVICE)
        eager.set_attn_implementation("eager")
        alone.append(torch.cat([eager(ids[:, a:b], use_cache=False).logits for a, b in ((0, 7), (7, 18))], 1))
    assert relative(found, alone[0]) < SLACK * relative(alone[1], alone[0]) + FLOOR
