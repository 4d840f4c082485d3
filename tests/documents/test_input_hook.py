from __future__ import annotations

import copy
import itertools
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import axattn
from axattn.documents import forward_context, native_guard
from axattn.documents.boundaries import Segments
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.patches.input_hooks import passes_inputs_on
from tests.models import alone, build, positions, tokens
from tests.sampling import part_of

PACKED = {"position_ids": positions((4, 6))}


@pytest.fixture(scope="module")
def model() -> Any:
    return axattn.apply(build("llama"), "varlen")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ({"position_ids": torch.zeros(3, 10, dtype=torch.long)}, r"shape \[3, 10\]"),
        ({"position_ids": torch.zeros(1, 9, dtype=torch.long)}, r"shape \[1, 9\]"),
        ({"position_ids": torch.zeros(3, 1, 10, dtype=torch.long)}, r"shape \[3, 1, 10\]"),
        ({"position_ids": torch.zeros(1, 10)}, "dtype float32"),
        ({"cu_seq_lens_q": int32(0, 4, 9)}, "ends at 9"),
        ({"cu_seq_lens_q": int32(0, 6, 4, 10)}, "decreases"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 10])}, "int64"),
        ({"cu_seq_lens_k": int32(0, 4, 9)}, "cu_seq_lens_k can't be used"),
        ({"cu_seq_lens_q": int32(0, 4, 10), "cu_seq_lens_k": int32(0, 5, 10)}, "different documents"),
    ],
)
def test_bad_input_is_one_clear_error_and_the_model_runs_on(model: Any, inputs: dict[str, Any], part: str) -> None:
    ids = tokens(1, 10)
    before = model(ids).logits
    with pytest.raises(InvalidInputError, match=part):
        model(ids, **inputs)
    assert forward_context.current() is None
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("shape", [(0, 10), (1, 0)])
def test_an_empty_batch_is_one_clear_error(model: Any, shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidInputError, match="the batch is empty"):
        model(torch.zeros(shape, dtype=torch.long))


def test_a_forward_that_raises_leaves_no_context_behind(model: Any) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 4), 10_000))
    assert forward_context.current() is None


def test_inner_models_called_by_themselves_are_guarded_too(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="ends at 9"):
        model.model(tokens(1, 10), cu_seq_lens_q=int32(0, 4, 9))
    with torch.no_grad():
        whole = model(tokens(1, 10), **PACKED, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(model.model(tokens(1, 10), **PACKED).last_hidden_state, whole)


@torch.no_grad()
def test_positional_arguments_are_read_as_well(model: Any) -> None:
    by_name = model(tokens(1, 10), **PACKED).logits
    assert torch.equal(model(tokens(1, 10), None, PACKED["position_ids"]).logits, by_name)


@torch.no_grad()
def test_input_embeddings_stand_for_tokens(model: Any) -> None:
    embeds = model.get_input_embeddings()(tokens(1, 10))
    assert torch.equal(model(inputs_embeds=embeds, **PACKED).logits, model(tokens(1, 10), **PACKED).logits)


@torch.no_grad()
def test_packed_rows_can_not_continue_from_a_cache(model: Any) -> None:
    cache = model(tokens(1, 3)).past_key_values
    with pytest.raises(InvalidInputError, match="can't continue from a cache"):
        model(tokens(1, 10), past_key_values=cache, **PACKED)


def test_packed_encoder_decoders_are_refused() -> None:
    config = tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = axattn.apply(tf.T5ForConditionalGeneration(config).eval(), "auto")
    ids = tokens(1, 10)
    model(input_ids=ids, labels=ids)
    document_ids = torch.tensor([[1] * 4 + [2] * 6])
    with pytest.raises(InvalidInputError, match="encoder-decoder"):
        model(input_ids=ids, attention_mask=document_ids, labels=ids)


def qwen_vl() -> Any:
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 97,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return tf.Qwen2_5_VLForConditionalGeneration(config).eval()


@torch.no_grad()
def test_planes_of_multimodal_positions_are_legal_and_packed_ones_kept_apart() -> None:
    model = axattn.apply(qwen_vl(), "auto")
    ids, where = tokens(1, 10), positions((4, 6))
    alone = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], 1)
    packed = model(ids, position_ids=where[None].expand(4, 1, 10)).logits
    assert torch.allclose(packed, alone, atol=1e-5)
    model(ids, position_ids=torch.arange(10).expand(3, 1, 10))
    with pytest.raises(InvalidInputError, match=r"This model takes \[1\|3\|4, 1, 10\]"):
        model(ids, position_ids=torch.arange(10).expand(5, 1, 10))


# ---- native names: the guard --------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("inputs", "part"),
    [
        ({}, "use_cache on"),
        ({"use_cache": False, "attention_mask": torch.ones(1, 10, dtype=torch.long)}, "2-D attention_mask"),
        ({"use_cache": False, "position_ids": None, "cu_seq_lens_q": int32(0, 4, 10)}, "none were given"),
        (
            {"use_cache": False, "position_ids": torch.arange(10)[None], "cu_seq_lens_q": int32(0, 4, 10)},
            "position_ids and cu_seq_lens_q describe different documents",
        ),
        (
            {"use_cache": False, "position_ids": torch.arange(10)[None], "cu_seq_lens_k": int32(0, 4, 10)},
            "position_ids and cu_seq_lens_k describe different documents",
        ),
        ({"use_cache": False, "cu_seq_lens_q": int32(0, 6, 10)}, "describe different documents"),
    ],
)
def test_packed_input_that_transformers_would_leak_is_refused(native: str, inputs: dict[str, Any], part: str) -> None:
    model = axattn.apply(build("llama"), native)
    with pytest.raises(UnsupportedAttentionError, match=part) as caught:
        model(tokens(1, 10), **{**PACKED, **inputs})
    assert 'attn_implementation="varlen"' in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_packed_input_that_transformers_serves_right_passes(native: str) -> None:
    model = axattn.apply(build("llama"), native)
    found = model(tokens(2, 10), position_ids=positions((4, 6), (5, 5)), use_cache=False).logits
    axattn.apply(model, "varlen")
    assert torch.allclose(found, model(tokens(2, 10), position_ids=positions((4, 6), (5, 5))).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "opt"])
def test_models_that_never_pass_positions_to_their_masks_are_refused_packed(family: str) -> None:
    model = axattn.apply(build(family), "eager")
    with pytest.raises(UnsupportedAttentionError, match="does not pass position_ids"):
        model(tokens(1, 10), **PACKED, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_a_decoder_made_bidirectional_packs_on_axattn_backends_alone(native: str) -> None:
    """``config.is_causal = False``, as embedding models have it: Transformers' masks then know no documents."""
    model = build("llama", is_causal=False)
    expected = alone(model, tokens(1, 10), (4, 6))
    axattn.apply(model, native)
    with pytest.raises(UnsupportedAttentionError, match=r"config\.is_causal is False"):
        model(tokens(1, 10), **PACKED, use_cache=False)
    axattn.apply(model, "varlen")
    assert torch.allclose(model(tokens(1, 10), **PACKED, use_cache=False).logits, expected, atol=1e-5)


def test_padded_batches_are_not_taken_for_packed_ones() -> None:
    model = axattn.apply(build("llama"), "sdpa")
    mask = torch.tensor([[0] * 4 + [1] * 6])
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    model(tokens(1, 10), attention_mask=mask, position_ids=where)
    assert model.generate(tokens(1, 10), attention_mask=mask, max_new_tokens=2, eos_token_id=None).shape == (1, 12)


LENGTHS = {"cu_seq_lens_q": int32(0, 4, 10), "cu_seq_lens_k": int32(0, 4, 10), "max_length_q": 6, "max_length_k": 6}


@pytest.mark.parametrize(
    ("inputs", "boundaries", "part"),
    [
        (PACKED, ((0, 4, 10),), None),
        (LENGTHS, ((0, 4, 10), (0, 10)), None),
        ({"position_ids": positions((4, 6), (4, 6))}, ((0, 4, 10), (0, 4, 10)), "only when there is one row"),
        ({"cu_seq_lens_q": int32(0, 4, 10)}, ((0, 4, 10),), "missing: cu_seq_lens_k, max_length_q, max_length_k"),
        ({}, ((0, 4, 10),), "neither cu_seq_lens nor position_ids"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6, 0, 1, 2, 3, 4, 5]])}, ((0, 4, 10),), "different positions"),
    ],
)
def test_the_guard_of_flash_names(inputs: dict[str, Any], boundaries: Any, part: str | None) -> None:
    segments = Segments(boundaries, torch.device("cpu"))
    call = ("flash_attention_2", torch.nn.Module(), inputs, segments, None)
    if part is None:
        native_guard.require_no_leak(*call)
    else:
        with pytest.raises(UnsupportedAttentionError, match=part):
            native_guard.require_no_leak(*call)


@pytest.mark.parametrize(("family", "answer"), [("llama", True), ("mistral", True), ("gpt_oss", False), ("opt", False)])
def test_whether_a_model_passes_positions_on_is_read_from_its_source(family: str, answer: bool) -> None:
    assert native_guard.passes_positions_to_masks(build(family)) is answer


@torch.no_grad()
@pytest.mark.parametrize(
    ("native", "described"),
    part_of(
        itertools.product(("sdpa", "eager"), ("packed", "unpadded", "unpadded, without a head")),
        kept=[("sdpa", "packed"), *itertools.product(("sdpa", "eager"), ("unpadded", "unpadded, without a head"))],
    ),
)
def test_a_model_switched_to_transformers_without_axattn_takes_no_packed_rows(native: str, described: str) -> None:
    made = build("llama")
    model = axattn.apply(made.model if "head" in described else made, "varlen", unpad="unpadded" in described)
    model.set_attn_implementation(native)
    ids = tokens(2, 10)
    given = {"position_ids": positions((4, 6), (7, 3)), "use_cache": False}
    if described != "packed":
        given = {"attention_mask": torch.ones_like(ids), "use_cache": False}
        given["attention_mask"][0, 6:] = 0
    with pytest.raises(UnsupportedAttentionError, match=f"it was switched to {native} after axattn"):
        model(ids, **given)
    assert torch.isfinite(model(ids, use_cache=False)[0]).all()
    if described == "packed":
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="packed rows would leak"):
            torch.compile(model, backend="eager")(ids, **given)
    axattn.apply(model, "varlen", unpad="unpadded" in described)
    assert torch.isfinite(model(ids, **given)[0]).all()


# ---- interrupts ---------------------------------------------------------------------------------------------------


def interrupted(model: Any, ids: torch.Tensor) -> None:
    """A packed forward that ends as Ctrl-C ends it: torch runs no forward hook then, whatever it is asked."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, position_ids=positions((4, 6)), use_cache=False)
    handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("again", ["the same model", "its inner model", "another model", "one without an input hook"])
def test_an_interrupted_forward_leaves_no_documents_to_the_next(again: str) -> None:
    model, ids = axattn.apply(build("llama"), "varlen"), tokens(1, 10)
    expected = model.model(ids, use_cache=False).last_hidden_state
    interrupted(model, ids)
    if again == "another model":
        model = axattn.apply(build("llama"), "varlen")
    elif again == "one without an input hook":
        model = build("llama")
        model.set_attn_implementation("varlen")
    whole = again == "the same model"
    found = model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1] if whole else None
    found = model.model(ids, use_cache=False).last_hidden_state if found is None else found
    assert torch.allclose(found, expected, atol=1e-5)
    assert forward_context.current() is None


# ---- copies -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copied_model_keeps_its_documents_apart_and_is_restored_by_itself(clone: Any) -> None:
    model = build("llama")
    try:
        clone(model)
    except AttributeError as error:  # Transformers 5.17 puts local classes into models when kernels is installed
        pytest.skip(f"Transformers' own model can't be cloned so: {error}")
    axattn.apply(model, "varlen")
    expected = model(tokens(1, 10), **PACKED).logits
    other = clone(model)
    assert torch.equal(other(tokens(1, 10), **PACKED).logits, expected)
    axattn.restore(other)
    assert other.config._attn_implementation == "sdpa"
    assert not other._forward_pre_hooks
    assert torch.equal(model(tokens(1, 10), **PACKED).logits, expected)
    assert model.config._attn_implementation == "varlen"


@pytest.mark.parametrize(
    ("cls", "answer"),
    [
        ("LlamaForCausalLM", True),
        ("Gemma2ForCausalLM", True),
        ("GptOssForCausalLM", False),  # the loss that balances its experts reads the mask
        ("OPTForCausalLM", False),
        ("LlamaForSequenceClassification", False),
    ],
)
def test_a_head_that_passes_all_its_inputs_on_is_read_from_its_source(cls: str, answer: bool) -> None:
    assert passes_inputs_on(getattr(tf, cls).forward, "model") is answer


def keeps_positions(self: Any, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
    return self.model(input_ids=input_ids, **kwargs)


def changes_a_mask(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
    attention_mask = None
    return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def drops_keywords(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
    return self.model(input_ids=input_ids)


def takes_one_out(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
    kwargs.pop("cu_seq_lens_q", None)
    return self.model(input_ids=input_ids, **kwargs)


def calls_twice(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
    return self.model(input_ids=input_ids, **kwargs) or self.model(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("forward", [keeps_positions, changes_a_mask, drops_keywords, takes_one_out, calls_twice])
def test_a_head_that_keeps_or_changes_an_input_gets_an_input_hook_of_its_own(forward: Any) -> None:
    assert passes_inputs_on(forward, "model") is False


def test_a_model_and_its_head_have_one_input_hook_between_them() -> None:
    model = axattn.apply(build("llama"), "varlen")
    assert len(model._forward_pre_hooks) == 0
    assert len(model.model._forward_pre_hooks) == 1


def test_two_threads_do_not_see_each_others_documents(model: Any) -> None:
    ids, found = tokens(1, 10), []
    with torch.no_grad():
        expected = model(ids).logits
        forward_context.slot().context = forward_context.Context(
            None, (1, 10), False, forward_context.BoundaryInputs(), model.model, None
        )  # as while a forward runs here
        try:
            thread = threading.Thread(target=lambda: found.extend([forward_context.current(), model(ids).logits]))
            thread.start()
            thread.join()
        finally:
            forward_context.slot().context = None
    assert found[0] is None
    assert torch.equal(found[1], expected)


@torch.no_grad()
def test_a_mask_of_document_ids_keeps_documents_apart() -> None:
    model = build("llama")
    ids = tokens(1, 12)
    expected = alone(model, ids[:, :10], (4, 6))
    axattn.apply(model, "varlen")
    document_ids = torch.tensor([[1] * 4 + [2] * 6 + [0] * 2])
    found = model(ids, attention_mask=document_ids, position_ids=positions((4, 6, 2))).logits
    assert torch.allclose(found[:, :10], expected, atol=1e-4)


@torch.no_grad()
def test_decoding_from_a_cache_that_a_packed_row_filled_is_refused() -> None:
    model = build("llama")
    axattn.apply(model, "varlen")
    out = model(tokens(1, 21), position_ids=positions((7, 11, 3)), use_cache=True)
    with pytest.raises(InvalidInputError, match="filled by a row of several documents"):
        model(tokens(1, 1), past_key_values=out.past_key_values)


@pytest.mark.parametrize("family", ["recurrent_gemma", "minimax"])
@pytest.mark.parametrize("name", ["auto", "sdpa"])
@torch.no_grad()
def test_packed_rows_would_leak_through_layers_that_are_no_attention(family: str, name: str) -> None:
    """What can't run document by document carries one into the next (errors up to 1.5 of 1)."""
    model = build(family)
    expected = model(tokens(1, 9), use_cache=False).logits
    axattn.apply(model, name)
    assert torch.allclose(model(tokens(1, 9), use_cache=False).logits, expected, atol=1e-4)
    with pytest.raises(axattn.UnsupportedAttentionError, match="outside of attention"):
        model(tokens(1, 9), position_ids=positions((4, 5)), use_cache=False)


@torch.no_grad()
def test_llama_4_s_layers_that_count_tokens_of_a_row_take_no_packed_rows_past_where_it_matters() -> None:
    model = axattn.apply(build("llama4", no_rope_layers=[1, 0], floor_scale=8), "auto")
    ids = tokens(1, 12)
    short = model(ids[:, :7], position_ids=positions((5, 2)), use_cache=False).logits
    assert torch.allclose(
        short, alone(build("llama4", no_rope_layers=[1, 0], floor_scale=8), ids[:, :7], (5, 2)), atol=1e-4
    )
    with pytest.raises(axattn.UnsupportedAttentionError, match="from 7 on"):
        model(ids, position_ids=positions((5, 7)), use_cache=False)
    assert model(ids, use_cache=False).logits.isfinite().all()  # one document counts right


@torch.no_grad()
def test_a_mask_with_documents_that_is_taken_away_is_missed(model: Any) -> None:
    """Accelerate's context parallelism hooks attention modules so; without a mask documents would see each other."""
    ids = tokens(1, 10)
    attention = model.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "attention_mask": None, "is_causal": True}), with_kwargs=True
    )
    try:
        with pytest.raises(UnsupportedAttentionError, match="did not reach it"):
            model(ids, **PACKED, use_cache=False)
        assert model(ids, use_cache=False).logits.isfinite().all()  # one document: causal is all there is
    finally:
        handle.remove()


@pytest.mark.parametrize("name", part_of(["sdpa", "eager"], kept=["sdpa"]))
def test_continuous_batching_is_transformers_own(name: str) -> None:
    """It gives lengths of keys by layer type, and keeps its requests apart itself (TRL's GRPO generates so)."""
    prompts = [ids.tolist() for ids in tokens(1, 14)[0].split((4, 3, 7))]
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}

    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # else it takes what memory there is

    def run(model: Any) -> list[list[int]]:
        made = model.generate_batch(prompts, tf.GenerationConfig(**greedy), small, warmup=False)
        return [made[key].generated_tokens for key in sorted(made)]

    model = build("llama")
    expected = [model.generate(torch.tensor([ids]), **greedy)[0, len(ids) :].tolist() for ids in prompts]
    assert run(axattn.apply(model, name)) == expected
