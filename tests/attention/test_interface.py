from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache
from transformers import masking_utils as mu

import axattn
from axattn.attention.interface import attend
from axattn.documents.boundaries import Segments
from axattn.errors import AxattnError, InvalidInputError, UnsupportedAttentionError
from axattn.hf.forward_inputs import AT_ATTENTION, CACHES
from axattn.hf.mask_functions import known
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import lazy_mask
from axattn.planning.routes import ATTRIBUTE, Route
from tests.census.configs import tiny
from tests.fakes.machine import hopper
from tests.models import amplify, build, positions, tokens


class Attention(torch.nn.Module):
    """A bare attention module, as far as the interface looks at one."""

    is_causal = True
    num_key_value_groups = 2


def qkv(q: int = 6, k: int = 6, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((4, q), (2, k), (2, k))]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **kwargs).transpose(1, 2)


def run(mask: Any, *, name: str = "varlen", inputs: list[torch.Tensor] | None = None, **kwargs: Any) -> torch.Tensor:
    out, weights = attend(name, Attention(), *(inputs or qkv()), mask, **kwargs)
    assert weights is None
    return out


def test_every_combination_of_mask_gives_the_same_causal_attention() -> None:
    expected = reference(*qkv(), is_causal=True)
    lower = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~lower, torch.finfo(torch.float32).min)
    for mask in (None, lazy_mask(2, 6, 6), lower, additive, lower.expand(2, 4, 6, 6)):
        assert torch.allclose(run(mask), expected, atol=1e-6), mask


def test_the_mask_beats_is_causal_and_without_one_is_causal_decides() -> None:
    full = reference(*qkv())
    assert torch.allclose(run(torch.ones(1, 1, 6, 6, dtype=torch.bool), is_causal=True), full, atol=1e-6)
    assert torch.allclose(run(None, is_causal=False), full, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, 1.0, 0.1])
def test_the_scale_is_the_one_asked_for(scaling: float | None) -> None:
    expected = reference(*qkv(), is_causal=True, scale=scaling)
    for mask in (None, lazy_mask(2, 6, 6)):
        assert torch.allclose(run(mask, scaling=scaling), expected, atol=1e-6)


def test_a_window_without_a_mask_is_honoured() -> None:
    index = torch.arange(6)
    seen = (index[None] <= index[:, None]) & (index[None] > index[:, None] - 2)
    assert torch.allclose(run(None, sliding_window=2), reference(*qkv(), attn_mask=seen), atol=1e-6)


def test_one_query_sees_every_key() -> None:
    inputs = qkv(1, 9)
    assert torch.allclose(run(None, inputs=inputs), reference(*inputs), atol=1e-6)
    mask = lazy_mask(2, 1, 9, q_offset=8)
    assert mask.as_flag is None or mask.as_flag == "full"
    assert torch.allclose(run(mask, inputs=inputs), reference(*inputs), atol=1e-6)


def test_queries_over_a_cache_are_aligned_bottom_right() -> None:
    inputs = qkv(3, 9)
    seen = torch.ones(3, 9, dtype=torch.bool).tril(6)
    mask = lazy_mask(2, 3, 9, q_offset=6)
    assert torch.allclose(run(mask, inputs=inputs), reference(*inputs, attn_mask=seen), atol=1e-6)


def test_an_empty_static_cache_is_aligned_top_left() -> None:
    inputs = qkv(3, 9)
    seen = torch.ones(3, 9, dtype=torch.bool).tril()
    assert torch.allclose(run(lazy_mask(2, 3, 9), inputs=inputs), reference(*inputs, attn_mask=seen), atol=1e-6)


def test_causal_attention_of_unequal_lengths_without_a_mask_is_ambiguous_and_refused() -> None:
    with pytest.raises(UnsupportedAttentionError, match="3 queries over 9 keys, no mask"):
        run(None, inputs=qkv(3, 9))


@pytest.mark.parametrize("keyword", sorted(AT_ATTENTION - {"cu_seq_lens_q", "position_ids"}))
def test_harmless_keywords_change_nothing(keyword: str) -> None:
    value = DynamicCache() if keyword in CACHES else True
    assert torch.equal(run(lazy_mask(2, 6, 6), **{keyword: value}), run(lazy_mask(2, 6, 6)))


def after_a_plain_call() -> LazyMask:
    """A mask on which the shortcut for plain calls is open: it must not let anything else through."""
    module = Attention()
    for _ in range(2):  # the first call finds the kernel, the second leaves its note on the mask
        mask = lazy_mask(2, 6, 6)
        mask.guarded = True
        attend("varlen", module, *qkv(), mask)
    assert mask.notes
    return mask


@pytest.mark.parametrize(
    "inputs",
    [qkv(), [x.double() for x in qkv()], [qkv()[0][:, :2], *qkv()[1:]]],
    ids=["same", "float64", "fewer heads"],
)
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_the_shortcut_for_plain_calls_computes_the_same(inputs: list[torch.Tensor], scaling: float | None) -> None:
    mask = after_a_plain_call()
    out = run(mask, inputs=inputs, scaling=scaling)
    assert torch.allclose(out, reference(*inputs, is_causal=True, scale=scaling), atol=1e-6)


def test_the_shortcut_counts_its_calls_and_stays_shut_under_autocast() -> None:
    module, mask = Attention(), after_a_plain_call()
    for _ in range(3):
        attend("varlen", module, *qkv(), mask)
    from axattn.planning.routes import route_of

    assert route_of(module, "varlen").served == {"varlen": 3}
    for _ in range(2):
        mask = lazy_mask(2, 6, 6)
        mask.guarded = True
        with torch.autocast("cpu", torch.bfloat16):
            attend("varlen", module, *qkv(), mask)
        assert not mask.notes


@pytest.mark.parametrize("value", [1, 0.5, "x", torch.ones(2)])
def test_an_unsupported_keyword_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedAttentionError, match="surprise"):
        run(after_a_plain_call(), surprise=value)
    run(lazy_mask(2, 6, 6), surprise=None)


@pytest.mark.parametrize(
    ("keyword", "value", "part"),
    [
        ("softcap", 30.0, "softcap=30.0"),
        ("position_bias", torch.zeros(1, 4, 6, 6), "bias"),
        ("indices", torch.zeros(2, 6, 1), "sparse"),
        ("output_attentions", True, "no attention weights"),
        ("cache", object(), "paged cache"),
    ],
)
def test_what_varlen_does_not_have_is_refused_not_dropped(keyword: str, value: Any, part: str) -> None:
    mask = after_a_plain_call()
    with pytest.raises(UnsupportedAttentionError, match=part):
        run(mask, **{keyword: value})


@pytest.mark.parametrize("keyword", ["s_aux", "sinks"])
def test_the_shortcut_for_plain_calls_lets_sinks_through(keyword: str) -> None:
    mask, (q, k, v), sinks = after_a_plain_call(), qkv(), torch.tensor([2.0, -1.0, 0.5, 3.0])
    key, value = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = (q @ key.transpose(-1, -2) * 8**-0.5).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -1e9)
    weights = torch.cat([logits, sinks[None, :, None, None].expand(2, 4, 6, 1)], -1).softmax(-1)[..., :-1]
    assert torch.allclose(run(mask, **{keyword: sinks}), (weights @ value).transpose(1, 2), atol=1e-6)
    assert torch.allclose(run(mask), reference(q, k, v, is_causal=True), atol=1e-6)


def test_dropout_is_stochastic_never_ignored() -> None:
    mask, inputs = after_a_plain_call(), qkv()
    assert torch.equal(run(mask, inputs=inputs), run(mask, inputs=inputs))
    assert not torch.equal(run(mask, inputs=inputs, dropout=0.5), run(mask, inputs=inputs, dropout=0.5))
    assert not torch.equal(run(mask, inputs=inputs, dropout=0.5), run(mask, inputs=inputs))


def test_a_position_bias_is_served_by_auto() -> None:
    bias = torch.randn(1, 4, 6, 6)
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = reference(*qkv(), attn_mask=bias.masked_fill(~lower, float("-inf")))
    assert torch.allclose(run(lazy_mask(2, 6, 6), name="auto", position_bias=bias), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "part"),
    [
        (torch.ones(2, 5, dtype=torch.bool), "shape"),
        (torch.ones(3, 6, dtype=torch.long), "shape"),
        (torch.ones(1, 1, 6, 5, dtype=torch.bool), "shape"),
        (torch.ones(3, 1, 6, 6, dtype=torch.bool), "shape"),
        (torch.ones(1, 1, 6, 6, dtype=torch.long), "dtype int64"),
        ("mask", "is a str"),
    ],
)
def test_a_mask_of_the_wrong_shape_or_dtype_is_one_clear_error(mask: Any, part: str) -> None:
    with pytest.raises(InvalidInputError, match=part):
        run(mask)


def test_under_autocast_the_output_has_its_dtype_and_equals_sdpa() -> None:
    q, k, v = qkv()
    v = v.bfloat16()
    for mask in (
        lazy_mask(2, 6, 6),
        lazy_mask(2, 6, 6, attention_mask=torch.tensor([[True] * 6, [True] * 4 + [False] * 2])),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(mask, inputs=[q, k, v])
        assert out.dtype == torch.bfloat16
        expected = reference(q.bfloat16(), k.bfloat16(), v, attn_mask=mask.dense())
        assert torch.allclose(out[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("name", ["auto", "varlen"])
def test_autocast_leaves_float64_alone(name: str) -> None:
    model = build("llama").double()
    ids, documents = tokens(1, 12), (7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([model(part).logits for part in ids.split(documents, 1)], 1)
        axattn.apply(model, name)
        found = model(ids, position_ids=positions(documents), use_cache=False).logits
        whole = model(ids[:, :7]).logits
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(whole, expected[:, :7], atol=1e-9)


def test_padding_queries_give_zeros_and_no_nan_in_gradients() -> None:
    inputs = [x.requires_grad_() for x in qkv()]
    mask = lazy_mask(2, 6, 6, attention_mask=torch.tensor([[True] * 6, [False] * 6]))
    out = run(mask, inputs=inputs)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("documents", [(2, 4), (3, 3)])
def test_a_model_without_an_input_hook_reads_documents_from_the_keywords(documents: tuple[int, int]) -> None:
    q, k, v = qkv()
    a = documents[0]
    parts = [reference(*(x[:, :, s] for x in (q, k, v)), is_causal=True) for s in (slice(0, a), slice(a, 6))]
    expected = torch.cat(parts, 1)
    lengths = torch.tensor([0, a, 6, 6 + a, 12], dtype=torch.int32)
    where = torch.tensor([[*range(a), *range(6 - a)]] * 2)
    for keywords in ({"cu_seq_lens_q": lengths}, {"position_ids": where}):
        mask = lazy_mask(2, 6, 6)
        assert not mask.guarded
        assert torch.allclose(run(mask, **keywords), expected, atol=1e-6)
    assert torch.allclose(run(None, cu_seq_lens_q=lengths), expected, atol=1e-6)


def test_a_vision_tower_reads_its_images_from_the_keywords() -> None:
    q, k, v = (x[:1] for x in qkv())
    lengths = torch.tensor([0, 2, 6], dtype=torch.int32)
    out = run(None, inputs=[q, k, v], cu_seq_lens_q=lengths, is_causal=False)
    parts = [reference(*(x[:, :, s] for x in (q, k, v))) for s in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(out, torch.cat(parts, 1), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_no_call_of_a_packed_forward_makes_a_dense_mask_unless_it_must(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    dense = LazyMask.dense
    monkeypatch.setattr(LazyMask, "dense", lambda self: made.append(1) or dense(self))
    model = build(family)
    axattn.apply(model, "auto")
    model(tokens(1, 8), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))
    assert bool(made) == (family == "gemma2")


def test_values_are_read_on_the_host_once_a_forward_not_once_a_layer() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                Count.reads += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for layers in (2, 6):
        model = build("llama", num_hidden_layers=layers)
        axattn.apply(model, "varlen")
        Count.reads = 0
        with torch.no_grad(), Count():
            model(tokens(1, 8), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), use_cache=False)
        counts.append(Count.reads)
    assert counts[0] == counts[1]


@pytest.mark.nightly
@torch.no_grad()
def test_a_compiled_model_keeps_documents_apart() -> None:
    model = axattn.apply(build("llama", num_hidden_layers=1), "varlen")
    inputs = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), "use_cache": False}
    expected = model(tokens(1, 8), **inputs).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(tokens(1, 8), **inputs).logits, expected, atol=1e-5)


def test_axattns_errors_share_a_base() -> None:
    assert issubclass(UnsupportedAttentionError, AxattnError)
    assert issubclass(UnsupportedAttentionError, ValueError)


def test_a_note_on_a_shared_mask_serves_only_layers_with_the_same_candidates() -> None:
    """Models share the plain causal mask; where one routes around its kernel, another must still ask its own."""
    mask = lazy_mask(2, 6, 6, 0, 0, known().causal, None, device="cpu")
    mask.guarded = True
    module = Attention()
    for _ in range(2):
        attend("varlen", module, *qkv(), mask)
    assert mask.notes
    other = Attention().train()
    other.__dict__[ATTRIBUTE] = Route("s2", "layer", ("s2",), "s2")
    attend("s2", other, *qkv(), mask)
    assert other.__dict__[ATTRIBUTE].served == {"s2": 1}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_a_2d_mask_means_what_transformers_own_masks_mean(causal: bool, window: int | None) -> None:
    real = torch.ones(2, 6, dtype=torch.long)
    real[1, :2] = 0
    kinds = {
        (True, None): mu.causal_mask_function,
        (False, None): mu.bidirectional_mask_function,
        (True, 3): mu.sliding_window_causal_mask_function(3),
        (False, 3): mu.sliding_window_bidirectional_mask_function(2),
    }
    rule = mu.sdpa_mask(2, 6, 6, mask_function=kinds[causal, window], allow_is_causal_skip=False)
    expected = reference(*qkv(), attn_mask=rule & real.bool()[:, None, None])
    found = run(real, is_causal=causal, sliding_window=window)
    seen = real.bool()
    assert torch.allclose(found[seen], expected[seen], atol=1e-5)


def test_a_2d_mask_over_a_cache_takes_the_queries_for_the_last_keys() -> None:
    q, k, v = qkv(2, 6)
    lower = torch.ones(6, 6, dtype=torch.bool).tril()[-2:]
    assert torch.allclose(run(torch.ones(2, 6), inputs=[q, k, v]), reference(q, k, v, attn_mask=lower), atol=1e-5)


def test_a_block_mask_is_honoured() -> None:
    def every_other(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k) % 2 == 0

    q, k, v = qkv()
    index = torch.arange(6)
    expected = reference(q, k, v, attn_mask=(index[:, None] - index) % 2 == 0)
    block = create_block_mask(every_other, None, None, 6, 6, device="cpu")
    assert torch.allclose(run(block), expected, atol=1e-5)
    with pytest.raises(InvalidInputError, match="BlockMask"):
        run(create_block_mask(every_other, None, None, 8, 8, device="cpu"))


def test_attention_weights_are_given_where_the_model_has_an_eager_function() -> None:
    model, ids = build("gemma2"), tokens(1, 8)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids, output_attentions=True)
        axattn.apply(model, "auto")
        found = model(ids, output_attentions=True)
        for a, b in zip(found.attentions, expected.attentions, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(found.logits, expected.logits, atol=1e-4)
        assert model(ids).attentions is None


@pytest.mark.parametrize("name", ["sdpa", "varlen", "s2"])
def test_attention_weights_that_a_kernel_lacks_are_refused(name: str) -> None:
    """Transformers' sdpa logs a warning and returns none."""
    model = axattn.apply(build("llama"), name)
    with pytest.raises(UnsupportedAttentionError, match="weights"):
        model(tokens(1, 8), output_attentions=True)


def test_attention_weights_asked_for_in_the_config_are_not_forgotten() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    axattn.apply(model, "varlen")
    with pytest.raises(UnsupportedAttentionError, match="weights"):
        model(tokens(1, 8))
    axattn.apply(model, "auto")
    assert [a.shape for a in model(tokens(1, 8)).attentions] == [(1, 4, 8, 8)] * 2


@pytest.mark.parametrize("kind", ["plain", "shortcut", "padded", "packed", "window"])
@pytest.mark.parametrize("tensor", ["query", "key", "value"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_wherever_it_is_seen(kind: str, tensor: str, value: float) -> None:
    """Within a document a kernel may carry a NaN further, as eager does (0 x NaN); other documents never see it."""
    module, at = Attention(), 3

    def mask() -> LazyMask:
        rule = mu.sliding_window_causal_mask_function(2) if kind == "window" else None
        padding = torch.tensor([[0, 1, 1, 1, 1, 1]] * 2, dtype=torch.bool) if kind == "padded" else None
        made = lazy_mask(2, 6, 6, 0, 0, rule or known().causal, padding, device="cpu")
        if kind == "packed":
            made = made.with_segments(Segments(((0, 2, 5, 6),) * 2, torch.device("cpu")))
        made.guarded = True
        return made

    tensors = dict(zip(("query", "key", "value"), qkv(), strict=True))
    if kind == "shortcut":
        attend("varlen", module, *tensors.values(), mask())
    clean = attend("varlen", module, *tensors.values(), mask())[0]
    tensors[tensor][:, :, at] = value
    found = attend("varlen", module, *tensors.values(), mask())[0].flatten(2)
    seen = mask().dense()[0, 0]
    hit = torch.arange(6) == at if tensor == "query" else seen[:, at]
    assert not torch.isfinite(found[:, hit]).all(-1).any()
    other = torch.tensor([0, 1, 5]) if kind == "packed" else torch.where(~hit)[0]
    if kind == "packed" or tensor == "query":
        assert torch.equal(found[:, other], clean.flatten(2)[:, other])


def test_queries_that_see_nothing_harm_no_gradient() -> None:
    seen = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    seen[1, :, 2] = False
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1] = False
    for mask in (
        seen,
        torch.zeros(2, 1, 6, 6).masked_fill(~seen, float("-inf")),
        lazy_mask(2, 6, 6, 0, 0, None, padding),
    ):
        q, k, v = (x.requires_grad_() for x in qkv())
        out = run(mask, inputs=[q, k, v])
        assert torch.allclose(out[0], reference(q, k, v, is_causal=True)[0], atol=1e-5)
        out[0].sum().backward()
        for x in (q, k, v):
            assert torch.isfinite(x.grad).all()
            assert (x.grad[1] == 0).all()


@torch.no_grad()
def test_more_keys_than_the_mask_knows_are_refused() -> None:
    """DeepSeek-V4 adds compressed keys that the mask does not know, where the mask is a tensor."""
    torch.manual_seed(0)
    config = tiny("deepseek_v4")
    model = axattn.apply(tf.AutoModelForCausalLM.from_config(config).eval(), "auto")
    with pytest.raises(UnsupportedAttentionError, match="20 queries and 22 keys, its mask is made for 20 and 20"):
        model(tokens(1, 20), use_cache=False)


def test_a_plain_mask_of_other_lengths_takes_no_shortcut() -> None:
    """The note that an earlier call left says nothing of lengths."""
    module, (q, k, v) = Attention(), qkv()
    masks = [lazy_mask(2, 6, 6) for _ in range(2)]
    for mask in masks:
        mask.guarded = True
    attend("varlen", module, q, k, v, masks[0])
    longer = [torch.cat([x, x[:, :, :2]], 2) for x in (k, v)]
    with pytest.raises(UnsupportedAttentionError, match="6 queries and 8 keys"):
        attend("varlen", module, q, *longer, masks[1])


@torch.no_grad()
def test_a_mask_of_the_model_s_own_making_keeps_no_documents_apart() -> None:
    model = axattn.apply(tf.AutoModelForMaskedLM.from_config(tiny("layoutlm", "masked")).eval(), "varlen")
    with pytest.raises(UnsupportedAttentionError, match="makes its mask itself"):
        model(tokens(1, 10), position_ids=positions((4, 6)))
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[0, 7:] = 0
    assert model(tokens(1, 10), attention_mask=mask).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bart", "mbart", "t5gemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_as_many_targets_as_padded_source_tokens(model_type: str, side: str) -> None:
    """Padding of the source is no padding of the targets, though the mask is square."""
    torch.manual_seed(0)
    model = tf.AutoModelForSeq2SeqLM.from_config(tiny(model_type, "seq2seq"), attn_implementation="eager").eval()
    amplify(model)
    ids, targets, mask = tokens(2, 9), tokens(2, 9, 5), torch.ones(2, 9, dtype=torch.long)
    mask[0, slice(0, 4) if side == "left" else slice(5, 9)] = 0
    expected = model(ids, attention_mask=mask, decoder_input_ids=targets).logits
    axattn.apply(model, "auto")
    found = model(ids, attention_mask=mask, decoder_input_ids=targets).logits
    assert torch.allclose(found, expected, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["auto", "varlen", "xformers"])
def test_the_output_can_be_viewed(name: str) -> None:
    """JetMoe and AFMoE take it with ``.view``."""
    for q in (torch.randn(2, 6, 4, 16).transpose(1, 2), torch.randn(2, 4, 6, 16)):
        with hopper("xformers"):
            out, _ = attend(name, Attention(), q, q, q, None)
        assert out.view(2, 6, 64).shape == (2, 6, 64)
