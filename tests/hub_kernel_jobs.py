"""The hub kernel in Transformers alone: ``TRITON_INTERPRET=1 python -m tests.hub_kernel_jobs`` in its own process.

axattn can't be imported here. Each check compares a tiny model on the kernel with the same model on eager. Prints a
line of JSON: what loaded the kernel, and for each check ``""`` or the error. No test lives here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "axattn/int8-flash-attn"
OUTPUT, GRADIENT = 0.015, 0.03  # as on axattn's own `sage` (tests/backends/test_sage.py)
CHECKS: dict[str, Callable[[], None]] = {}
LENGTHS = (8, 11, 5)


class Blocked:
    """A finder by which axattn does not exist."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "axattn":
            raise ModuleNotFoundError(f"{name} is blocked: the kernel must do without")


sys.meta_path.insert(0, Blocked)  # type: ignore[arg-type]  # a finder needs this one function

import torch  # noqa: E402
import transformers as tf  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformers.integrations import hub_kernels  # noqa: E402

from tests.models import REFUSED, alone, amplify, build, positions, tokens  # noqa: E402


def check(function: Callable[[], None]) -> None:
    CHECKS[function.__name__] = function


def loaded_by() -> str:
    """What loads the kernel: ``kernels``, or a stand-in where Transformers refuses the installed one."""
    if hub_kernels.is_kernels_available():
        import kernels

        return f"kernels {kernels.__version__}"

    def get_kernel(repository: str, **_: Any) -> ModuleType:
        path = Path(dict([os.environ["LOCAL_KERNELS"].split("=")])[repository]) / "build" / "torch-cpu"
        name = json.loads((path / "metadata.json").read_text())["id"]
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    hub_kernels.is_kernels_available = lambda: True
    hub_kernels.get_kernel = get_kernel
    return "a stand-in for kernels"


def softened(family: str, **options: Any) -> Any:
    """A model whose attention spreads over several keys: INT8 then costs what it costs a trained model."""
    model = build(family, **options)
    for name, parameter in model.named_parameters():
        if "q_proj" in name:
            parameter.data.div_(4)
    return model


def pair(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    """The same model on the kernel and on eager."""
    found, wanted = softened(family, **options), softened(family, **options)
    found.set_attn_implementation(NAME, allow_all_kernels=True)
    wanted.set_attn_implementation("eager")
    assert found.config._attn_implementation == NAME
    return found, wanted


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def close(a: torch.Tensor, b: torch.Tensor, bound: float = OUTPUT) -> None:
    assert 0 < relative(a, b) < bound, relative(a, b)  # not 0: that would be another kernel


def projections(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if any(f"{part}_proj" in n for part in "qkvo")}


def gradients_follow(found: Any, wanted: Any) -> None:
    for name, gradient in projections(wanted).items():
        got = projections(found)[name]
        assert got is not None, name
        assert got.norm() > 0, name
        assert relative(got, gradient) < GRADIENT, (name, relative(got, gradient))


@check
def from_pretrained_loads_it() -> None:
    folder = Path(os.environ["WORK"]) / "model"
    softened("llama", head_dim=16).save_pretrained(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=NAME, allow_all_kernels=True)
    close(model(tokens(2, 12)).logits, softened("llama", head_dim=16)(tokens(2, 12)).logits)


@check
def a_padded_batch_equals_its_documents_alone() -> None:
    found, wanted = pair(head_dim=16)
    ids = tokens(2, 20)
    for real in (slice(0, 13), slice(7, 20)):  # padded on the right, on the left
        mask = torch.zeros_like(ids)
        mask[0], mask[1, real] = 1, 1
        logits = found(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        close(logits[0], wanted(ids[:1]).logits[0])
        close(logits[1, real], wanted(ids[1:, real]).logits[0])


@check
def packed_rows_do_not_leak() -> None:
    found, wanted = pair(head_dim=16)
    ids = tokens(1, sum(LENGTHS))
    logits = found(ids, position_ids=positions(LENGTHS)).logits  # with the cache on
    close(logits, alone(wanted, ids, LENGTHS))
    other = ids.clone()
    other[0, 8:19] = tokens(1, 11, seed=5)[0]
    changed = found(other, position_ids=positions(LENGTHS)).logits
    assert torch.equal(logits[0, :8], changed[0, :8])
    assert torch.equal(logits[0, 19:], changed[0, 19:])
    assert not torch.equal(logits[0, 8:19], changed[0, 8:19])


@check
def a_collator_may_give_the_lengths() -> None:
    found, wanted = pair(head_dim=16)
    rows = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in LENGTHS]
    batch = tf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    assert "cu_seq_lens_q" in batch
    close(found(**batch, use_cache=False).logits, alone(wanted, batch["input_ids"], LENGTHS))


@check
def a_packed_step_has_true_gradients() -> None:
    ids = tokens(1, sum(LENGTHS))
    for checkpointing in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        found, wanted = (model.train() for model in pair(head_dim=16))
        if checkpointing:
            found.gradient_checkpointing_enable(checkpointing)
            found.enable_input_require_grads()
        expected = alone(wanted, ids, LENGTHS)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        (expected * weight).sum().backward()
        (found(ids, position_ids=positions(LENGTHS), use_cache=False).logits * weight).sum().backward()
        gradients_follow(found, wanted)


@check
def a_padded_step_has_true_gradients() -> None:
    found, wanted = (model.train() for model in pair(head_dim=16))
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (found, wanted)]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[1]
    for loss in losses:
        loss.backward()
    gradients_follow(found, wanted)


@check
def float16_is_served_and_what_the_interpreter_gets_wrong_is_refused() -> None:
    found, wanted = (model.to(torch.float16) for model in pair(head_dim=16))
    close(found(tokens(2, 12)).logits, wanted(tokens(2, 12)).logits)
    refuses(lambda: found.to(torch.bfloat16)(tokens(2, 12)), "multiplies the bits of bfloat16")


@check
def generation_follows_eager() -> None:
    found, wanted = pair(head_dim=16)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    answers = [m.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options) for m in (found, wanted)]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    close(torch.stack(answers[0].logits), torch.stack(answers[1].logits))


@check
def windows_are_kept() -> None:
    found, wanted = pair("mistral", head_dim=16)
    ids = tokens(1, 30)
    close(found(ids).logits, wanted(ids).logits)
    close(found(ids, position_ids=positions((13, 17))).logits, alone(wanted, ids, (13, 17)))
    wide = pair("mistral", head_dim=16, sliding_window=100)[0]
    assert relative(wide(ids).logits, wanted(ids).logits) > 10 * OUTPUT


@check
def encoders_attend_to_both_sides() -> None:
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    outs = []
    for name in (NAME, "eager"):
        torch.manual_seed(0)
        model = tf.BertModel(config).eval()
        amplify(model)
        model.set_attn_implementation(name, allow_all_kernels=True)
        outs.append(model(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    close(*outs)


@check
def a_softcap_is_served_in_inference_and_refused_in_training() -> None:
    found, wanted = pair("gemma2", head_dim=16)
    with torch.no_grad():
        close(found(tokens(1, 20)).logits, wanted(tokens(1, 20)).logits, 2 * OUTPUT)
    refuses(lambda: found(tokens(1, 20)), "softcap")


@check
def dropout_is_refused_in_training() -> None:
    found, wanted = pair(head_dim=16, attention_dropout=0.1)
    close(found(tokens(1, 9)).logits, wanted(tokens(1, 9)).logits)
    refuses(lambda: found.train()(tokens(1, 9)), "dropout_p=0.1")


@check
def models_without_flash_attention_are_refused() -> None:
    if Version(tf.__version__) < Version("5.24"):  # 5.17 loads it, and the model runs its own attention
        return
    config = REFUSED["bloom"]()
    try:
        tf.BloomForCausalLM._from_config(config, attn_implementation=NAME)
    except ValueError as error:
        said = str(error)
    assert "does not support Flash Attention" in said


@check
def a_second_gradient_is_refused() -> None:
    found, _ = pair(head_dim=16)
    loss = found(tokens(1, 9), labels=tokens(1, 9)).loss
    weight = found.model.layers[0].self_attn.q_proj.weight
    refuses(lambda: torch.autograd.grad(loss, weight, create_graph=True), "create_graph=True")


@check
def compiled_models_follow() -> None:
    found, wanted = pair(head_dim=16)
    compiled = torch.compile(found, backend="eager")
    close(compiled(tokens(1, 12), use_cache=False).logits, wanted(tokens(1, 12)).logits)


@check
def axattn_is_not_here() -> None:
    assert not [name for name in sys.modules if name.partition(".")[0] == "axattn"]
    assert any(name.startswith("_int8_flash_attn") for name in sys.modules)


def refuses(call: Callable[[], Any], text: str) -> None:
    said = "nothing"
    try:
        call()
    except NotImplementedError as error:
        said = str(error)
    assert text in said, said


def main() -> None:
    torch.set_num_threads(1)
    source, results = loaded_by(), {}
    for name, function in CHECKS.items():
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps({"loaded_by": source, "results": results}))


if __name__ == "__main__":
    main()
