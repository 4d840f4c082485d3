"""The scenarios of the matrix: what is asked of a model, what eager gives on each document alone, and the tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.conformance.cases import Batch, Case, Result, image_inputs, packed, padded
from tests.conformance.families import Family
from tests.models import tokens

LENGTHS = (7, 11, 3)
EXACT = 1e-5
DECODERS = frozenset({"decoder", "vision"})
SELF = DECODERS | {"encoder"}
ALL = SELF | {"encoder-decoder"}
PROJECTIONS = ("q_", "k_", "v_", "o_proj", "qkv", "kv_", "out_proj", "Wqkv", "Wo", "query", "key", "value", "embed")


@dataclass(frozen=True)
class Scenario:
    """One row of the matrix.

    Attributes:
        name: as in the table.
        run: ``Case`` → (expected, found), each a dict of tensors; runs the candidate only if `expected` could be made.
        kinds: families it applies to.
        applies: why it does not apply to a family, "" when it does.
        tolerance: largest error (see `cells.error`) that counts as equal.
    """

    name: str
    run: Callable[[Case], tuple[Result, Callable[[], Result]]]
    kinds: frozenset[str]
    applies: Callable[[Family], str] = lambda family: ""
    tolerance: float = EXACT


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, kinds: frozenset[str], **options: Any) -> Callable[[Any], Any]:
    """Register a scenario."""

    def add(function: Any) -> Any:
        SCENARIOS[name] = Scenario(name, function, kinds, **options)
        return function

    return add


# ---- one document a row --------------------------------------------------------------------------------------------


def _documents(case: Case, batch: Batch, **inputs: Any) -> tuple[Result, Callable[[], Result]]:
    """Outputs of a batch without gradients, against each document alone."""
    with torch.no_grad():
        expected = {"logits": case.alone(batch)}

    def found() -> Result:
        with torch.no_grad():
            return {"logits": case.cut(batch, case.forward(case.candidate(), batch.ids, **inputs))}

    return expected, found


@scenario("dense", SELF)
def dense(case: Case) -> Any:
    return _documents(case, packed((12,), (12,)))


@scenario("longer than window and chunk", SELF)
def long(case: Case) -> Any:
    return _documents(case, packed((70,)))


@scenario("right padding", SELF)
def right_padding(case: Case) -> Any:
    batch = padded(12, 7, side="right")
    return _documents(case, batch, attention_mask=batch.mask)


@scenario("left padding", DECODERS)
def left_padding(case: Case) -> Any:
    batch = padded(12, 7, side="left")
    where = {"position_ids": case.positions(batch.positions)}
    return _documents(case, batch, attention_mask=batch.mask, **where)


@scenario("padding on both sides and a hole", DECODERS)
def hole(case: Case) -> Any:
    """A row whose real tokens are not contiguous: eager with the same mask says what is right."""
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :2], mask[0, 9:], mask[1, 4:6] = 0, 0, 0
    real = mask.bool()

    def run(model: Any) -> Result:
        with torch.no_grad():
            return {"logits": case.forward(model, ids, attention_mask=mask)[real]}

    return run(case.reference()), lambda: run(case.candidate())


# ---- packed rows ---------------------------------------------------------------------------------------------------


@scenario("packed, cache on by default", SELF)
def packed_default(case: Case) -> Any:
    batch = packed(LENGTHS)
    return _documents(case, batch, position_ids=case.positions(batch.positions))


@scenario("packed, cache off", DECODERS)
def packed_no_cache(case: Case) -> Any:
    batch = packed(LENGTHS)
    return _documents(case, batch, position_ids=case.positions(batch.positions), use_cache=False)


@scenario("packed, all-ones mask", SELF)
def packed_ones(case: Case) -> Any:
    batch = packed(LENGTHS)
    mask = torch.ones_like(batch.ids)
    return _documents(case, batch, position_ids=case.positions(batch.positions), attention_mask=mask)


@scenario("packed, cu_seq_lens", SELF, applies=lambda f: "" if f.lengths else "its forward takes no cu_seq_lens")
def packed_lengths(case: Case) -> Any:
    batch = packed(LENGTHS)
    edges = torch.tensor([0, 7, 18, 21], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 11, "max_length_k": 11}
    return _documents(case, batch, position_ids=case.positions(batch.positions), **lengths)


@scenario("packed, many rows", SELF)
def packed_rows(case: Case) -> Any:
    batch = packed(LENGTHS, (5, 16), (21,))
    return _documents(case, batch, position_ids=case.positions(batch.positions))


@scenario("packed, right padding", SELF)
def packed_padded(case: Case) -> Any:
    batch = packed(LENGTHS, (5, 9), pad=2)
    return _documents(case, batch, position_ids=case.positions(batch.positions), attention_mask=batch.mask)


@scenario("packed, documents not from position 0", SELF)
def packed_shifted(case: Case) -> Any:
    batch = packed(LENGTHS)
    shift = torch.tensor([3] * 7 + [20] * 11 + [1] * 3)[None]
    batch = Batch(batch.ids, batch.documents, batch.positions + shift)
    return _documents(case, batch, position_ids=case.positions(batch.positions))


# ---- gradients -----------------------------------------------------------------------------------------------------


def _gradients(case: Case, batch: Batch, checkpointing: bool | None = None) -> tuple[Result, Callable[[], Result]]:
    """Gradients of the inputs and of the projections, and the logits, against the sum over the documents alone."""
    width: dict[str, torch.Tensor] = {}

    def weight(out: torch.Tensor) -> torch.Tensor:
        if "target" not in width:
            width["target"] = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        return (out * width["target"]).sum()

    def taken(model: Any, logits: torch.Tensor) -> Result:
        found = {"logits": logits.detach()}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and any(part in name for part in PROJECTIONS):
                found[f"d {name}"] = parameter.grad.reshape(1, -1)
        return found

    reference = case.reference().train()
    logits = case.alone(batch, reference)
    weight(logits).backward()

    def found() -> Result:
        model = case.candidate().train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        inputs = {"attention_mask": batch.mask, "position_ids": case.positions(batch.positions)}
        logits = case.cut(batch, case.forward(model, batch.ids, **inputs))
        weight(logits).backward()
        return taken(model, logits)

    return taken(reference, logits), found


@scenario("gradients, right padding", SELF, tolerance=2e-5)
def padded_gradients(case: Case) -> Any:
    return _gradients(case, padded(12, 7, side="right"))


@scenario("packed gradients", SELF, tolerance=2e-5)
def gradients(case: Case) -> Any:
    return _gradients(case, packed(LENGTHS, (5, 9), pad=2))


@scenario("packed gradients, reentrant checkpointing", SELF, tolerance=2e-5)
def reentrant(case: Case) -> Any:
    return _gradients(case, packed(LENGTHS, (5, 9), pad=2), True)


@scenario("packed gradients, checkpointing", SELF, tolerance=2e-5)
def not_reentrant(case: Case) -> Any:
    return _gradients(case, packed(LENGTHS, (5, 9), pad=2), False)


@scenario("no leak between documents", SELF)
def leak(case: Case) -> Any:
    """Another token in the second document: outputs and input gradients of the others stay, bit for bit."""
    batch = packed(LENGTHS)
    changed = batch.ids.clone()
    changed[0, 9] = 3 + (changed[0, 9] - 2) % 94
    others = torch.tensor([True] * 7 + [False] * 11 + [True] * 3)

    def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        out = model(inputs_embeds=embeds, position_ids=case.positions(batch.positions))[0][0]
        (grad,) = torch.autograd.grad(out[others].square().sum(), embeds)
        return out.detach(), grad[0]

    zero = torch.zeros(1, 1)
    expected = {"outputs": zero, "gradients": zero, "gradient to the other document": zero, "changed": zero + 1}

    def found() -> Result:
        model = case.candidate()
        (out, grad), (out2, grad2) = run(model, batch.ids), run(model, changed)
        exact = 1e-6 if case.family.experts else 0.0

        def differs(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            worst = ((a - b).abs().max() / a.abs().max()).item()
            return zero + (worst if worst > exact else 0.0)

        return {
            "outputs": differs(out[others], out2[others]),
            "gradients": differs(grad[others], grad2[others]),
            "gradient to the other document": zero + grad[~others].abs().max().item(),
            "changed": zero + float(not torch.equal(out[~others], out2[~others])),
        }

    return expected, found


# ---- decoding ------------------------------------------------------------------------------------------------------


def _generated(case: Case, **options: Any) -> tuple[Result, Callable[[], Result]]:
    """Greedy tokens of a left-padded batch, against each row alone, unpadded, on eager with a dynamic cache."""
    batch = padded(9, 5, side="left")
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = case.reference()
    rows = [model.generate(batch.ids[r : r + 1, a:b], **greedy)[0, b - a :] for r, a, b in batch.documents]

    def found() -> Result:
        ours = case.candidate().generate(batch.ids, attention_mask=batch.mask, **greedy, **options)
        return {"tokens": ours[:, batch.ids.shape[1] :].float()}

    return {"tokens": torch.stack(rows).float()}, found


@scenario("generate, left padding", DECODERS)
def generate(case: Case) -> Any:
    return _generated(case)


@scenario("generate, static cache", DECODERS)
def generate_static(case: Case) -> Any:
    return _generated(case, cache_implementation="static", disable_compile=True)


@scenario("prefill, then two chunks over the cache", DECODERS)
def chunks_over_a_cache(case: Case) -> Any:
    """Several tokens at once over a filled cache (speculative decoding): bottom-right alignment."""
    batch = packed((15,))
    with torch.no_grad():
        expected = {"logits": case.alone(batch)}

    def found() -> Result:
        model, cache, parts = case.candidate(), None, []
        with torch.no_grad():
            for a, b in ((0, 8), (8, 12), (12, 15)):
                where = case.positions(batch.positions[:, a:b])
                out = model(batch.ids[:, a:b], position_ids=where, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out[0][0])
        return {"logits": torch.cat(parts)}

    return expected, found


# ---- options of the call -------------------------------------------------------------------------------------------


@scenario(
    "dropout", SELF, applies=lambda f: "" if f.dropout and f.kind != "vision" else "no attention dropout of its own"
)
def dropout(case: Case) -> Any:
    """Two seeds differ from each other and from no dropout; the same seed repeats."""
    ids = tokens(1, 12)
    one = torch.ones(1, 1)

    def found() -> Result:
        model = case.candidate(**{case.family.dropout: 0.5}).train()
        outs = []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            outs.append(case.forward(model, ids).detach())
        plain = case.forward(model.eval(), ids).detach()
        return {
            "differs by seed": one * float(not torch.equal(outs[0], outs[1])),
            "differs from none": one * float(not torch.equal(outs[0], plain)),
            "repeats": one * float(torch.equal(outs[0], outs[2])),
        }

    return {"differs by seed": one, "differs from none": one, "repeats": one}, found


@scenario("output_attentions", ALL)
def attentions(case: Case) -> Any:
    ids = tokens(1, 12)

    def run(model: Any) -> Result:
        extra = {"decoder_input_ids": ids.flip(-1)} if case.family.kind == "encoder-decoder" else {}
        with torch.no_grad():
            out = model(ids, output_attentions=True, **extra)
        given = out.encoder_attentions if extra else out.attentions
        weights = [a.flatten(0, -2) for a in given or ()]
        return {"logits": out[0][0], **{f"attention {i}": a for i, a in enumerate(weights)}}

    return run(case.reference()), lambda: run(case.candidate())


@scenario("bf16 autocast over fp32 weights", SELF, tolerance=6e-2)
def autocast(case: Case) -> Any:
    batch = packed(LENGTHS)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = {"logits": case.alone(batch).float()}

    def found() -> Result:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = case.forward(case.candidate(), batch.ids, position_ids=case.positions(batch.positions))
        return {"logits": case.cut(batch, out).float()}

    return expected, found


def _own_mask(case: Case, additive: bool) -> tuple[Result, Callable[[], Result]]:
    """A user's 4-D mask with holes, which replaces Transformers' own."""
    ids, where = tokens(2, 12), torch.arange(12).expand(2, 12)
    generator = torch.Generator().manual_seed(7)
    seen = torch.rand(2, 1, 12, 12, generator=generator) > 0.4
    seen = (seen | torch.eye(12, dtype=torch.bool)).tril()
    values = torch.randn(2, 1, 12, 12, generator=generator) if additive else torch.zeros(2, 1, 12, 12)
    values = values.masked_fill(~seen, torch.finfo(torch.float32).min)

    def run(model: Any, mask: torch.Tensor) -> Result:
        with torch.no_grad():
            out = case.forward(model, ids, attention_mask=mask, position_ids=case.positions(where))
            return {"logits": out.flatten(0, 1)}

    return run(case.reference(), values), lambda: run(case.candidate(), values if additive else seen)


@scenario("own 4-D bool mask", SELF)
def bool_mask(case: Case) -> Any:
    return _own_mask(case, additive=False)


@scenario("own 4-D float mask", SELF)
def float_mask(case: Case) -> Any:
    return _own_mask(case, additive=True)


@scenario("an image in the text", frozenset({"vision"}))
def image(case: Case) -> Any:
    """The vision tower, and (Gemma 3) image blocks that see each other both ways."""
    ids, inputs = image_inputs(case.family)

    def run(model: Any) -> Result:
        with torch.no_grad():
            return {"logits": model(ids, **inputs).logits[0]}

    return run(case.reference()), lambda: run(case.candidate())


# ---- encoder-decoders ----------------------------------------------------------------------------------------------

SEQ2SEQ = frozenset({"encoder-decoder"})


@scenario("cross-attention over a padded encoder", SEQ2SEQ)
def cross_attention(case: Case) -> Any:
    batch, answer = padded(12, 7, side="right"), tokens(2, 6, 3)

    def run(model: Any, rows: slice, width: int, **inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(batch.ids[rows, :width], decoder_input_ids=answer[rows], **inputs).logits

    model = case.reference()
    expected = torch.cat([run(model, slice(0, 1), 12), run(model, slice(1, 2), 7)])

    def found() -> Result:
        return {"logits": run(case.candidate(), slice(None), 12, attention_mask=batch.mask).flatten(0, 1)}

    return {"logits": expected.flatten(0, 1)}, found


@scenario("encoder-decoder gradients", SEQ2SEQ, tolerance=2e-5)
def seq2seq_gradients(case: Case) -> Any:
    batch, answer = padded(12, 7, side="right"), tokens(2, 6, 3)

    def run(model: Any, rows: slice, width: int, **inputs: Any) -> None:
        logits = model(batch.ids[rows, :width], decoder_input_ids=answer[rows], **inputs).logits
        logits.square().sum().backward()

    def taken(model: Any) -> Result:
        return {n: p.grad.reshape(1, -1) for n, p in model.named_parameters() if p.grad is not None}

    reference = case.reference().train()
    run(reference, slice(0, 1), 12)
    run(reference, slice(1, 2), 7)

    def found() -> Result:
        model = case.candidate().train()
        run(model, slice(None), 12, attention_mask=batch.mask)
        return taken(model)

    return taken(reference), found


@scenario("encoder-decoder generate", SEQ2SEQ)
def seq2seq_generate(case: Case) -> Any:
    batch = padded(12, 7, side="right")
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    model = case.reference()
    rows = [model.generate(batch.ids[r : r + 1, a:b], **greedy)[0] for r, a, b in batch.documents]

    def found() -> Result:
        return {"tokens": case.candidate().generate(batch.ids, attention_mask=batch.mask, **greedy).float()}

    return {"tokens": torch.stack(rows).float()}, found


# ---- torch.compile -------------------------------------------------------------------------------------------------


@scenario("compiled, fullgraph", DECODERS)
def compiled(case: Case) -> Any:
    """One graph for plain, padded and packed batches (traced, not lowered: the arithmetic stays PyTorch's)."""
    batches = {"plain": packed((12,), (12,)), "padded": padded(12, 7, side="left"), "packed": packed(LENGTHS)}
    with torch.no_grad():
        expected = {name: case.alone(batch) for name, batch in batches.items()}

    def found() -> Result:
        torch._dynamo.reset()
        model = torch.compile(case.candidate(), fullgraph=True, backend="eager")
        results = {}
        for name, batch in batches.items():
            inputs: dict[str, Any] = {"use_cache": False}
            if name != "plain":
                inputs["position_ids"] = case.positions(batch.positions)
            if name == "padded":
                inputs["attention_mask"] = batch.mask
            with torch.no_grad():
                results[name] = case.cut(batch, case.forward(model, batch.ids, **inputs))
        return results

    return expected, found
