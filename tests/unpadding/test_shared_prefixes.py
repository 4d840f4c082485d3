"""``share_prefixes=True``: losses, logits and gradients of the batch as it came, each prompt run once."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import axattn
from axattn.documents.boundaries import Segments
from axattn.errors import UnsupportedAttentionError
from axattn.masks.varlen_layout import Layout
from axattn.spec import notices
from axattn.unpadding.shared_prefixes import backbone_of
from tests.fakes.machine import hopper
from tests.faults import Patch, fault
from tests.interpreter import INTERPRETED, interpreting
from tests.models import CONFIGS, HYBRIDS, build, tokens
from tests.parallel_jobs import compare, gradients
from tests.sampling import OLDEST, part_of

PROMPT = 20
"""Longer than every window and chunk of `tests.models`."""


def batch(side: str = "right", labels: bool = True) -> dict[str, Any]:
    """Two prompts with four completions each, and a row that shares nothing; padded."""
    generator = torch.Generator().manual_seed(0)

    def some(n: int) -> torch.Tensor:
        return torch.randint(3, 97, (n,), generator=generator)

    rows = []
    for length in (PROMPT, PROMPT + 4):
        prompt = some(length)
        rows += [(prompt, some(n)) for n in (5, 9, 7, 5)]
    rows.append((some(15), some(6)))
    width = max(len(a) + len(b) for a, b in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(rows):
        whole = torch.cat([prompt, completion])
        at = slice(0, len(whole)) if side == "right" else slice(width - len(whole), width)
        ids[row, at], mask[row, at] = whole, 1
        targets[row, at] = torch.cat([torch.full_like(prompt, -100), completion])
    found = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    return found | {"labels": targets} if labels else found


class Sizes:
    """The tokens that each forward of a model's layers runs."""

    def __init__(self, model: Any) -> None:
        self.seen: list[int] = []
        layer = next(iter(backbone_of(model).layers if hasattr(backbone_of(model), "layers") else []), None)
        first: Any = layer if layer is not None else next(m for m in model.modules() if "Layer" in type(m).__name__)
        first.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _: Any, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.seen.append(x.shape[0] * x.shape[1])


def step(model: Any, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(**given)
    out.loss.backward()
    real = given["attention_mask"].bool() if "attention_mask" in given else slice(None)
    return out.loss.detach(), out.logits.detach()[real], gradients(model)


def stock(family: str, **sizes: Any) -> Any:
    model = build(family, **sizes).train()
    model.set_attn_implementation("eager")
    return model


def require_equal(model: Any, reference: Any, given: dict[str, Any], limit: float = 1e-5) -> None:
    loss, logits, grads = step(model, given)
    wanted_loss, wanted_logits, wanted = step(reference, given)
    assert torch.allclose(loss, wanted_loss, atol=limit)
    assert torch.allclose(logits, wanted_logits, atol=limit)
    assert compare(grads, wanted) < 10 * limit


MIX_TOKENS = ("recurrent_gemma", "minimax")
FAMILIES = [family for family in (*CONFIGS, *HYBRIDS) if family not in ("llama4", *MIX_TOKENS)]
LEAST = ("llama", "mistral", "gemma3", "gpt_oss", "deepseek_v3", "opt", "qwen3_next")


@pytest.mark.parametrize("family", part_of(FAMILIES, kept=LEAST))
def test_loss_logits_and_gradients_are_those_of_the_batch(family: str) -> None:
    model = axattn.apply(build(family).train(), "auto", share_prefixes=True)
    sizes = Sizes(model)
    require_equal(model, stock(family), batch())
    assert sizes.seen == [117]  # of 249 real tokens in 9 x 33


def test_a_head_that_is_its_own_base_model() -> None:
    """Llama 4's head: the backbone is found by what takes no labels. Its chunks count along the path."""
    model = axattn.apply(build("llama4").train(), "auto", share_prefixes=True)
    assert backbone_of(model) is model.model
    require_equal(model, stock("llama4"), batch())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reentrant", part_of([False, True], kept=[False]))
def test_checkpoints_and_padding_on_either_side(side: str, reentrant: bool) -> None:
    model, reference = axattn.apply(build("llama").train(), "varlen", share_prefixes=True), stock("llama")
    for one in (model, reference):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
    require_equal(model, reference, batch(side))


def test_rows_without_padding_and_with_several_documents() -> None:
    """The documents of packed rows share too, within a row and between rows."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 97, (PROMPT,), generator=generator)
    rows = [torch.cat([prompt, tokens(1, 4, n)[0], prompt, tokens(1, 6, n + 9)[0]]) for n in (1, 2)]
    ids = torch.stack(rows)
    where = torch.cat([torch.arange(PROMPT + 4), torch.arange(PROMPT + 6)]).expand(2, -1)
    given = {
        "input_ids": ids,
        "position_ids": where,
        "labels": ids.masked_fill(where < PROMPT, -100),
        "use_cache": False,
    }
    model = axattn.apply(build("mistral").train(), "auto", share_prefixes=True)
    sizes = Sizes(model)
    require_equal(model, axattn.apply(build("mistral").train(), "auto"), given)
    assert sizes.seen == [PROMPT + 20]


def test_with_unpad() -> None:
    model = axattn.apply(build("llama").train(), "auto", unpad=True, share_prefixes=True)
    sizes = Sizes(model)
    require_equal(model, stock("llama"), batch())
    assert sizes.seen == [117]


KERNELS: list[tuple[str, float]] = [("xformers", 1e-5), ("fp8", 0.1), ("sage", 0.1)]


@pytest.mark.parametrize(("name", "limit"), part_of(KERNELS, kept=KERNELS[:1]))
def test_kernels_of_libraries(name: str, limit: float) -> None:
    with hopper(name):
        model = axattn.apply(build("llama").train(), name, share_prefixes=True)
        require_equal(model, stock("llama"), batch(), limit)
        assert set(axattn.status(model).layers[0].served) == {name}


def test_flash_attention_on_a_pretended_gpu() -> None:
    with hopper("flash_attention_3"):
        model = axattn.apply(build("mistral").train(), "auto", share_prefixes=True)
        require_equal(model, stock("mistral"), batch(), 1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off (no triton from 3.7 on, or a GPU is there)")
@pytest.mark.nightly
def test_the_int8_kernel() -> None:
    with interpreting():
        model = axattn.apply(build("llama", head_dim=16).train(), "sage", share_prefixes=True)
        require_equal(model, stock("llama", head_dim=16), batch(), 0.1)


@torch.no_grad()
def test_outputs_that_a_caller_may_ask_for() -> None:
    model = axattn.apply(build("llama"), "auto", share_prefixes=True)
    reference = build("llama")
    given = batch(labels=False) | {"output_hidden_states": True}
    real = given["attention_mask"].bool()
    found, expected = model(**given), reference(**given)
    for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.allclose(a[real], b[real], atol=1e-5)
    kept = model(**batch("left", labels=False), logits_to_keep=5).logits
    assert torch.allclose(kept, reference(**batch("left", labels=False), logits_to_keep=5).logits, atol=1e-5)
    assert isinstance(model(**batch(labels=False), return_dict=False), tuple)
    last = axattn.apply(build("llama").model, "auto", share_prefixes=True)(**batch(labels=False)).last_hidden_state
    assert torch.allclose(last[real], reference.model(**batch(labels=False)).last_hidden_state[real], atol=1e-5)


@torch.no_grad()
def test_generation_and_batches_that_share_nothing_run_as_they_came() -> None:
    model, reference = axattn.apply(build("llama"), "auto", share_prefixes=True), build("llama")
    given = batch("left", labels=False)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    given.pop("use_cache")
    assert torch.equal(model.generate(**given, **how), reference.generate(**given, **how))
    sizes = Sizes(model)
    model(tokens(2, 30), use_cache=False)
    assert sizes.seen == [60]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    monkeypatch.setattr(notices, "_given", set())
    caplog.set_level(logging.WARNING, "axattn")
    return lambda: " ".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("what", ["attention", "config", "module", "noise"])
def test_random_numbers_per_token_run_the_batch_unchanged_with_a_warning(what: str, said: Callable[[], str]) -> None:
    model = build("llama", attention_dropout=0.1 if what == "attention" else 0.0)
    if what == "module":
        model.model.layers[1].mlp = torch.nn.Sequential(torch.nn.Dropout(0.2), model.model.layers[1].mlp)
    axattn.apply(model, "auto", share_prefixes=True)
    if what == "config":  # read there in each forward (Persimmon)
        model.config.attention_dropout = 0.1
    if what == "noise":
        model.get_input_embeddings().neftune_noise_alpha = 5.0
    sizes = Sizes(model)
    for _ in range(2):
        model.train()(**batch())
    assert sizes.seen == [9 * 33] * 2
    assert said().count("one draw would serve several documents") == 1
    assert {
        "attention": "attention_dropout is 0.1",
        "config": "config.attention_dropout",
        "module": "mlp.0 drops",
        "noise": "NEFTune",
    }[what] in said()
    model.eval()
    with torch.no_grad():
        model(**batch())
    assert sizes.seen[2:] == [117]  # nothing is drawn in evaluation


def test_lora_of_peft_added_afterwards() -> None:
    peft = pytest.importorskip("peft")
    models = []
    for shared in (True, False):
        base = build("llama").train()
        base = axattn.apply(base, "auto", share_prefixes=True) if shared else stock("llama")
        torch.manual_seed(0)
        models.append(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    loss, _, grads = step(models[0], batch())
    wanted_loss, _, wanted = step(models[1], batch())
    assert torch.allclose(loss, wanted_loss, atol=1e-5)
    assert compare(grads, wanted) < 1e-4


def test_layers_compiled_by_themselves_share_and_a_compiled_model_runs_as_it_came() -> None:
    torch._dynamo.reset()
    model, reference = axattn.apply(build("llama", num_hidden_layers=1).train(), "varlen", share_prefixes=True), None
    reference = stock("llama", num_hidden_layers=1)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    require_equal(model, reference, batch())
    torch._dynamo.reset()
    whole = axattn.apply(build("llama", num_hidden_layers=1).train(), "varlen", share_prefixes=True)
    loss = torch.compile(whole, backend="eager")(**batch()).loss
    assert torch.allclose(loss, reference(**batch()).loss, atol=1e-5)


@pytest.mark.nightly
def test_a_compiled_backbone_runs_as_it_came() -> None:
    torch._dynamo.reset()
    model = axattn.apply(build("llama", num_hidden_layers=1).train(), "varlen", share_prefixes=True)
    model.model.compile(backend="eager")
    require_equal(model, stock("llama", num_hidden_layers=1), batch())


def test_it_is_kept_copied_restored_and_loaded(tmp_path: Path) -> None:
    model = axattn.apply(build("llama"), "auto", share_prefixes=True)
    with axattn.using(model, "varlen"):
        sizes = Sizes(model)
        model(**batch())
        assert sizes.seen == [9 * 33]
    copies = [copy.deepcopy(model)]
    if not OLDEST:  # stock models of 5.17 can't be pickled
        copies.append(pickle.loads(pickle.dumps(model)))
    for one in (model, *copies):
        sizes = Sizes(one)
        one(**batch())
        assert sizes.seen[-1] == 117
    axattn.restore(model)
    assert "forward" not in vars(model.model)
    build("llama").save_pretrained(tmp_path)
    loaded = axattn.from_pretrained(tmp_path, attn_implementation="auto", share_prefixes=True)
    sizes = Sizes(loaded)
    loaded(**batch())
    assert sizes.seen == [117]


def build_bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=97, **sizes))


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "native": (lambda: build("llama"), "sdpa", "sdpa is called by Transformers"),
    "encoder": (build_bert, "auto", "its attention is not causal"),
    "sparse": (lambda: build("llama"), "s2", "s2 has no documents that go on from others"),
    "mixer": (lambda: build("minimax"), "auto", "linear_attention mix tokens outside of attention"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cant_share_is_refused_with_the_reason_and_left_unchanged(what: str) -> None:
    make, name, text = REFUSED[what]
    model = make()
    with pytest.raises(UnsupportedAttentionError, match=text):
        axattn.apply(model, name, share_prefixes=True)
    assert axattn.status(model).patches == 0


def test_over_ranks_it_is_left_out() -> None:
    """See tests/parallel for rows over ranks."""
    from axattn.documents.forward_context import assume
    from axattn.documents.sequence_shard import SequenceShard

    model = axattn.apply(build("llama"), "auto", share_prefixes=True)
    seen = []
    backbone = model.model

    def forward(inputs: dict[str, Any]) -> str:
        seen.append(inputs)
        return "as it came"

    change = vars(backbone)["forward"].change.change
    with assume(shard=SequenceShard(None, 2, 0, 1, 10, None, None)):
        assert change(backbone, forward, batch(labels=False)) == "as it came"


# ---- does a test see what is wrong? ----------------------------------------------------------------------------------


@fault("share_prefixes: loss and gradients are no longer those of the batch")
def documents_do_not_see_their_stems(patch: Patch) -> None:
    patch.setattr(Layout, "with_stems", property(lambda layout: [(span, ()) for span in layout.spans]))


@fault("share_prefixes: loss and gradients are no longer those of the batch")
def a_stem_is_the_whole_document_before(patch: Patch) -> None:
    """A completion would see the one before it."""
    from axattn.unpadding import shared_prefixes

    def whole(boundaries: Any, device: Any, stems: Any = None) -> Segments:
        if stems is not None:
            wider = [((0, boundaries[0][n]),) if stem else () for n, stem in enumerate(stems[0])]
            stems = (tuple(wider),)
        return Segments(boundaries, device, stems)

    patch.setattr(shared_prefixes, "Segments", whole)


@fault("share_prefixes: loss and gradients are no longer those of the batch")
def shared_states_go_to_one_document_only(patch: Patch) -> None:
    from axattn.documents.unpadded_batch import UnpaddedBatch

    restore = UnpaddedBatch.restore

    def once(self: Any, x: torch.Tensor) -> torch.Tensor:
        whole = restore(self, x)
        first = torch.zeros(self.rows * self.length, dtype=torch.bool)
        first[self.keep] = True
        return whole * first.view(self.rows, self.length, 1)

    patch.setattr(UnpaddedBatch, "restore", once)


@pytest.mark.parametrize(
    "put_in",
    [documents_do_not_see_their_stems, a_stem_is_the_whole_document_before, shared_states_go_to_one_document_only],
)
def test_a_fault_is_seen(put_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(monkeypatch)
    model = axattn.apply(build("llama").train(), "varlen", share_prefixes=True)
    with pytest.raises(AssertionError):
        require_equal(model, stock("llama"), batch())
