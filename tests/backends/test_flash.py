"""Flash kernels over strict fakes: the fakes' limits, the direct adapters, plans in which only some layers use them."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import transformers.modeling_flash_attention_utils as fa

import axattn
from axattn.backends import flash_calls, get
from axattn.backends.call import AttentionCall
from axattn.documents import native_flash_guard
from axattn.documents.boundaries import Segments
from axattn.errors import BackendUnavailableError, UnsupportedAttentionError
from axattn.machine.environment import files_differ
from axattn.masks.mask_interface import lazy_mask
from axattn.spec.capability import Need, missing
from axattn.traits import native_names
from tests.census.configs import tiny
from tests.conformance.families import FAMILIES
from tests.environments import AMPERE, BLACKWELL, HOPPER, machine
from tests.fakes import flash
from tests.fakes.machine import FLASH, hopper
from tests.models import alone, build, positions, tokens

FAKES = {2: flash.FlashAttention2, 3: flash.FlashAttention3, 4: flash.FlashAttention4}


def inputs(dtype: torch.dtype = torch.bfloat16, dim: int = 16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(10, heads, dim, dtype=dtype) for heads in (4, 2, 2)]


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(version: int, q: Any, k: Any, v: Any, cu: Any = None, longest: Any = 6, **options: Any) -> Any:
    cu = lengths(0, 4, 10) if cu is None else cu
    return FAKES[version].flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest, **options
    )


@pytest.mark.parametrize("version", [2, 3, 4])
def test_the_fakes_refuse_what_the_kernels_refuse(version: int) -> None:
    run(version, *inputs())
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        run(version, *inputs(torch.float32))
    with pytest.raises(RuntimeError, match="head dimension"):
        run(version, *inputs(dim=264))
    with pytest.raises(RuntimeError, match="head dimension"):
        run(version, *inputs(dim=12))
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="same head dimension"):
        run(version, q, k, v[..., :8])
    with pytest.raises(RuntimeError, match="int32"):
        run(version, *inputs(), cu=torch.tensor([0, 4, 10]))
    with pytest.raises(RuntimeError, match="longer than max_seqlen"):
        run(version, *inputs(), longest=5)
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        run(version, *inputs(), cu=lengths(0, 4, 11), longest=7)


@pytest.mark.parametrize(
    ("version", "keyword"), [(2, "learnable_sink"), (3, "dropout_p"), (3, "s_aux"), (4, "dropout_p")]
)
def test_the_fakes_take_no_keyword_that_the_kernels_lack(version: int, keyword: str) -> None:
    with pytest.raises(TypeError, match=keyword):
        run(version, *inputs(), **{keyword: 0.1})


def test_the_fake_of_flash_attention_4_returns_a_pair_and_wants_ints() -> None:
    out, lse = run(4, *inputs())
    assert out.shape == (10, 4, 16)
    assert lse is None
    with pytest.raises(TypeError, match="int"):
        run(4, *inputs(), longest=torch.tensor(6))
    with pytest.raises(TypeError, match="bfloat16"):
        run(4, *inputs(), learnable_sink=torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", ["plain", "padded", "decode", "no mask", "value dim"])
def test_the_direct_adapters_compute_the_mask_they_are_given(
    version: int, window: int | None, causal: bool, case: str
) -> None:
    if case == "decode" and not causal:
        pytest.skip("only causal models decode")
    torch.manual_seed(0)
    S, T = (2, 6) if case == "decode" else (6, 6)
    dim = 8 if case == "value dim" else 16
    q, k, v = torch.randn(2, 4, S, 16), torch.randn(2, 2, T, 16), torch.randn(2, 2, T, dim)
    rule = flash_mask(causal, window)
    padding = torch.ones(2, T, dtype=torch.bool)
    padding[1, :2] = case != "padded"
    mask = None if case == "no mask" else lazy_mask(2, S, T, T - S, 0, rule, padding, device="cpu")
    call = AttentionCall(torch.nn.Identity(), q, k, v, mask, causal, window, 0.3, 0.0, 2.0, None, None, {})
    distance = torch.arange(T - S, T)[:, None] - torch.arange(T)
    seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    seen = seen if window is None else seen & (distance.abs() < window)
    logits = torch.einsum("bhsd,bhtd->bhst", q, k.repeat_interleave(2, 1)) * 0.3
    logits = (2.0 * torch.tanh(logits / 2.0)).masked_fill(~(seen & padding[:, None, None]), -1e9)
    expected = torch.einsum("bhst,bhtd->bshd", logits.softmax(-1), v.repeat_interleave(2, 1))
    with hopper(f"flash_attention_{version}"):
        found = getattr(flash_calls, f"flash_{version}")(call)
        assert flash.calls == [f"flash_attention_{version}"]
    real = padding[:, T - S :]
    assert torch.allclose(found[real], expected[real], atol=1e-5)


def flash_mask(causal: bool, window: int | None) -> Any:
    from transformers import masking_utils as mu

    if causal:
        return mu.causal_mask_function if window is None else mu.sliding_window_causal_mask_function(window)
    return (
        mu.bidirectional_mask_function if window is None else mu.sliding_window_bidirectional_mask_function(window - 1)
    )


@torch.no_grad()
@pytest.mark.parametrize("name", FLASH)
def test_gemma_4_runs_its_sliding_layers_on_flash_and_its_global_ones_on_the_next_exact_kernel(name: str) -> None:
    with hopper(name):
        with pytest.raises(UnsupportedAttentionError, match="head_dim=512"):
            axattn.apply(FAMILIES["gemma4"].make(), name)
        model = axattn.apply(FAMILIES["gemma4"].make(), name, on_unsupported="route")
        found = model(tokens(1, 18), position_ids=positions((7, 11)), use_cache=False).logits
        kinds = [model.config.layer_types[i] for i in range(4)]
        wanted = {"sliding_attention": name, "full_attention": "varlen"}
        layers = axattn.status(model).layers
        assert [layer.planned for layer in layers] == [wanted[kind] for kind in kinds]
        assert [set(layer.served) for layer in layers] == [{wanted[kind]} for kind in kinds]
        assert set(flash.calls) == {name}
    expected = alone(FAMILIES["gemma4"].make(), tokens(1, 18), (7, 11))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@torch.no_grad()
def test_a_mixed_plan_is_logged_once_and_is_data(caplog: pytest.LogCaptureFixture) -> None:
    with hopper("flash_attention_2") as environment:
        config = FAMILIES["gemma4"].make().config
        found = axattn.plan(config, "flash_attention_2", on_unsupported="route", environment=environment)
    assert found.running == {"": "auto"}
    assert found.asked == {"": "flash_attention_2"}
    assert found.orders[""] == ("flash_attention_2", "varlen", "sdpa", "eager")
    assert [entry.chosen for entry in found.layers] == ["flash_attention_2", "varlen"] * 2
    assert "can't serve every layer" in str(found)
    assert "head_dim=512 (flash_attention_2 serves up to 256)" in str(found)


@torch.no_grad()
@pytest.mark.parametrize("name", FLASH)
def test_a_call_that_flash_can_not_serve_is_routed_in_a_mixed_plan(name: str) -> None:
    """float64 reaches no flash kernel, fake or not; the order of the plan says what comes next."""
    with hopper(name):
        model = axattn.apply(FAMILIES["gemma4"].make().double(), name, on_unsupported="route")
        model(tokens(1, 8))
        assert {kernel for layer in axattn.status(model).layers for kernel in layer.served} == {"varlen"}


def test_latent_attention_is_planned_on_flash_with_its_wider_head_dim() -> None:
    with hopper("flash_attention_2") as environment:
        config = build("deepseek_v3").config
        plan = axattn.plan(config, "flash_attention_2", environment=environment)
        assert plan.running == {"": "flash_attention_2"}


@pytest.mark.parametrize(
    ("mask", "holes"),
    [
        ([[1, 1, 1, 1]], False),
        ([[0, 0, 1, 1]], False),
        ([[1, 1, 0, 0]], False),
        ([[0, 1, 1, 0]], False),
        ([[0, 0, 0, 0]], False),
        ([[1, 0, 1, 1]], True),
        ([[1, 1, 1, 1], [0, 1, 0, 1]], True),
    ],
)
def test_padding_between_real_tokens_is_seen(mask: list[list[int]], holes: bool) -> None:
    assert native_flash_guard._is_non_contiguous(torch.tensor(mask)) is holes


def test_which_attention_classes_pass_their_keywords_on() -> None:
    model = build("llama")
    assert native_flash_guard.passes_keywords(type(model.model.layers[0].self_attn))
    assert not native_flash_guard.passes_keywords(torch.nn.Linear)


def test_documents_that_do_not_reach_the_attention_module_are_refused() -> None:
    segments = Segments(((0, 4, 10),), torch.device("cpu"))
    attention = build("llama").model.layers[0].self_attn
    where = {"position_ids": positions((4, 6))}
    native_flash_guard.require_reached("flash_attention_2", attention, where, segments)
    native_flash_guard.require_reached(
        "flash_attention_4", attention, native_flash_guard.lengths_of(segments), segments
    )
    for name, module, kwargs in (
        ("flash_attention_2", attention, {}),
        ("flash_attention_4", attention, where),  # a tensor for an int
        ("flash_attention_2", torch.nn.Linear(2, 2), where),  # does not pass them on
    ):
        with pytest.raises(UnsupportedAttentionError, match="do not reach"):
            native_flash_guard.require_reached(name, module, kwargs, segments)


@torch.no_grad()
@pytest.mark.parametrize("name", FLASH)
def test_the_input_hook_gives_the_flash_path_the_lengths_of_the_documents(name: str) -> None:
    """Transformers reads positions only when there is one row, and passes FlashAttention 4 a tensor for an int."""
    ids, rows = tokens(2, 21), ((7, 11, 3), (5, 16))
    expected = torch.cat([alone(build("mistral"), ids[i : i + 1], rows[i]) for i in range(2)])
    with hopper(name):
        model = axattn.apply(build("mistral"), name)
        found = model(ids, position_ids=positions(*rows), use_cache=False).logits
        assert torch.allclose(found, expected, atol=1e-4)
        partly = {"cu_seq_lens_q": lengths(0, 7, 18, 21, 26, 42)}
        assert torch.allclose(model(ids, position_ids=positions(*rows), **partly).logits, expected, atol=1e-4)
        mask = torch.ones_like(ids)
        assert torch.allclose(
            model(ids, attention_mask=mask, position_ids=positions(*rows)).logits, expected, atol=1e-4
        )
        mask[0, -1] = 0
        with pytest.raises(UnsupportedAttentionError, match="with padding the flash path reads the mask"):
            model(ids, attention_mask=mask, position_ids=positions(*rows))


@pytest.mark.parametrize(
    ("environment", "head_dim", "value_dim", "served"),
    [
        (HOPPER, 256, 256, True),
        (HOPPER, 192, 128, True),
        (HOPPER, 264, 264, False),
        (BLACKWELL, 128, 128, True),
        (BLACKWELL, 256, 256, True),
        (BLACKWELL, 192, 192, False),
        (BLACKWELL, 192, 128, False),
        (BLACKWELL, 136, 136, False),
        (machine("cuda", 103), 192, 192, False),
        (machine("cuda", 110), 256, 256, True),
        (machine("cuda", 120), 192, 128, True),
        (machine("cuda", 121), 200, 200, False),
    ],
)
def test_head_dims_of_flash_attention_4_by_architecture(
    environment: Any, head_dim: int, value_dim: int, served: bool
) -> None:
    need = Need(head_dim=head_dim, value_dim=value_dim, heads=8, kv_heads=8)
    assert (missing(need, get("flash_attention_4").capability_on(environment)) == []) is served


@pytest.mark.parametrize(
    ("sm", "fields", "part"),
    [
        *((90, {"head_dim": 256, **extra}, "") for extra in ({"window": 96}, {"softcap": 30.0}, {"sinks": True})),
        (100, {"head_dim": 256}, ""),
        (100, {"head_dim": 128, "window": 96, "softcap": 30.0, "sinks": True}, ""),
        (100, {"head_dim": 256, "window": 96}, "window in training, head_dim=256 .*inference only on sm100"),
        (103, {"head_dim": 256, "softcap": 30.0}, "softcap in training"),
        (110, {"head_dim": 256, "sinks": True}, "sinks in training"),
        (120, {"head_dim": 160, "window": 96, "softcap": 30.0}, ""),
        (120, {"head_dim": 168}, "in training, head_dim=168 .*99 KiB of shared memory"),
        (121, {"head_dim": 64, "sinks": True}, "no attention sinks"),
    ],
)
def test_training_of_flash_attention_4_by_architecture(sm: int, fields: dict[str, Any], part: str) -> None:
    """`tests.real.test_fa4` asks the library itself."""
    record = get("flash_attention_4").capability_on(machine("cuda", sm))
    reasons = missing(Need(**fields, gradient=True), record, "flash_attention_4")
    assert bool(reasons) is bool(part)
    assert all(re.search(part, reason.text) for reason in reasons)
    if part and not fields.get("sinks"):
        assert missing(Need(**fields), record) == []


@pytest.mark.parametrize("policy", ["raise", "route"])
def test_a_kernel_that_has_no_backward_for_a_layer_is_refused_in_training_alone(policy: Any) -> None:
    """Gemma 3 on a B200 by the kernel's own name: flash-attn-4 would raise in the backward, after a whole forward."""
    ids, reference = tokens(1, 12), build("mistral", head_dim=256)
    with hopper("flash_attention_4", sm=100):
        model = axattn.apply(build("mistral", head_dim=256), "flash_attention_4", on_unsupported=policy)
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-4)
        assert {layer.planned for layer in axattn.status(model).layers} == {"flash_attention_4"}
        assert set(flash.calls) == {"flash_attention_4"}
        if policy == "raise":
            with pytest.raises(UnsupportedAttentionError, match=r"^flash_attention_4 can't serve .* in training"):
                model(ids)
            return
        model(ids).logits.sum().backward()
        assert all(layer.served.get("varlen") for layer in axattn.status(model).layers)
    reference(ids).logits.sum().backward()
    found, wanted = (m.model.layers[0].self_attn.q_proj.weight.grad for m in (model, reference))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_flash_attention_3_is_for_hopper_alone() -> None:
    probe = get("flash_attention_3").probe
    assert probe(HOPPER) == []
    assert "built for Hopper" in probe(BLACKWELL)[0].text
    assert "needs sm90" in probe(AMPERE)[0].text


def test_flash_attention_2_becomes_4_on_hopper_where_every_layer_allows_it(caplog: pytest.LogCaptureFixture) -> None:
    with hopper("flash_attention_2", "flash_attention_4"):
        model = build("mistral")
        for _ in range(2):
            axattn.apply(model, "flash_attention_2")
        with torch.no_grad():
            model(tokens(1, 8))
        status = axattn.status(model)
        assert (status.asked, status.running) == ({"": "flash_attention_2"}, {"": "flash_attention_4"})
        assert set(flash.calls) == {"flash_attention_4"}
        assert sum("flash_attention_2 → flash_attention_4" in line for line in caplog.messages) == 1
        axattn.restore(model)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "how", ["argument", "variable", "Ampere", "no FA4", "a layer can't", "no backward", "slower", "dropout"]
)
def test_flash_attention_2_stays_where_anything_rules_the_upgrade_out(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, config, options = HOPPER, build("mistral").config, {}
    if how == "argument":
        options["upgrade_flash"] = False
    elif how == "variable":
        monkeypatch.setenv("AXATTN_NO_FA4", "1")
    elif how == "Ampere":
        environment = AMPERE
    elif how == "no FA4":
        environment = machine("cuda", 90, flash_attn_4=None)
    elif how == "a layer can't":
        environment, config = BLACKWELL, build("mistral", head_dim=192).config
    elif how == "no backward":
        environment, config = BLACKWELL, build("mistral", head_dim=256).config
    elif how == "slower":
        environment = machine("cuda", 120)
    else:
        config = build("mistral", attention_dropout=0.1).config
    plan = axattn.plan(config, "flash_attention_2", environment=environment, **options)
    assert plan.running == {"": "flash_attention_2"}


@pytest.mark.parametrize("sm", [90, 100, 120])
def test_the_upgrade_needs_no_flash_attention_2(sm: int) -> None:
    environment = machine("cuda", sm, flash_attn=None)
    plan = axattn.plan(build("llama").config, "flash_attention_2", environment=environment)
    assert plan.running == {"": "flash_attention_4"}
    assert plan.layers[0].asked == "flash_attention_2"
    assert plan.layers[0].chosen == "flash_attention_4"


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError("no kernel image is available"), ImportError("undefined symbol")])
def test_a_kernel_that_fails_in_its_first_call_is_named_and_the_model_stays_usable(
    error: Exception,
) -> None:
    with hopper("flash_attention_2"), pytest.MonkeyPatch.context() as patch:
        model = axattn.apply(FAMILIES["gemma4"].make(), "flash_attention_2", on_unsupported="route")

        def broken(version: int) -> Any:
            raise error

        for name in ("varlen_function", "dense_function"):
            patch.setattr(flash_calls, name, broken)
        with pytest.raises(BackendUnavailableError, match=f"failed in its first call on .*{error}") as caught:
            model(tokens(1, 8))
        assert caught.value.__cause__ is error
        axattn.apply(model, "auto")
        assert torch.isfinite(model(tokens(1, 8)).logits).all()


@torch.no_grad()
def test_running_out_of_memory_stays_what_it_is() -> None:
    with hopper("flash_attention_2"), pytest.MonkeyPatch.context() as patch:
        model = axattn.apply(FAMILIES["gemma4"].make(), "flash_attention_2", on_unsupported="route")

        def full(version: int) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        for name in ("varlen_function", "dense_function"):
            patch.setattr(flash_calls, name, full)
        with pytest.raises(torch.OutOfMemoryError):
            model(tokens(1, 8))


def test_a_kernel_that_transformers_would_swap_for_another_is_refused() -> None:
    """gpt-oss lists the flash kernels it takes; Transformers replaces any other with a warning."""
    with hopper(*FLASH), pytest.MonkeyPatch.context() as patch:
        with pytest.raises(UnsupportedAttentionError, match="sinks"):
            axattn.apply(build("gpt_oss"), "flash_attention_3")
        patch.setattr(tf.MistralForCausalLM, "_compatible_flash_implementations", ["flash_attention_4"])
        with pytest.raises(UnsupportedAttentionError, match="would run MistralForCausalLM on flash_attention_4"):
            axattn.apply(build("mistral"), "flash_attention_3")


def test_no_upgrade_to_a_kernel_that_the_model_does_not_list(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build("mistral").config
    config.architectures = ["MistralForCausalLM"]
    assert axattn.plan(config, "flash_attention_2", environment=HOPPER).running == {"": "flash_attention_4"}
    monkeypatch.setattr(tf.MistralForCausalLM, "_compatible_flash_implementations", ["flash_attention_2"])
    assert axattn.plan(config, "flash_attention_2", environment=HOPPER).running == {"": "flash_attention_2"}


@pytest.mark.parametrize(
    ("environment", "part", "fix"),
    [
        (machine("cuda", 90, flash_attn_4=None), "flash-attn-4 is not installed", "pip install --pre flash-attn-4"),
        (machine("cuda", 90, nvidia_cutlass_dsl="4.5"), "nvidia-cutlass-dsl 4.5 is older than 4.6.2", ">=4.6.2"),
        (machine("cuda", 90, quack_kernels=None), "quack-kernels is not installed", ">=0.5.3"),
        (dataclasses.replace(HOPPER, flash_attn_4_shadowed=True), "shadows that of flash-attn-4", "force-reinstall"),
    ],
)
def test_what_flash_attention_4_needs_is_reported_with_the_command_that_fixes_it(
    environment: Any, part: str, fix: str
) -> None:
    (reason,) = get("flash_attention_4").probe(environment)
    assert part in reason.text
    assert fix in reason.fix


def test_a_package_whose_files_another_has_overwritten_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "brought" / "module.py"
    own.parent.mkdir()
    own.write_text("own = True\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(own.read_bytes()).digest()).decode().rstrip("=")
    info = tmp_path / "brought-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"brought/module.py,sha256={digest},11\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not files_differ("brought", "brought/module.py")
    own.write_text("own = False\n")
    assert files_differ("brought", "brought/module.py")
    assert not files_differ("brought", "brought/absent.py")


@pytest.mark.parametrize("broken", [ImportError("undefined symbol: _ZN2at"), OSError("libcudart.so.12: cannot open")])
def test_a_flash_library_that_fails_to_import_leaves_no_trace(
    broken: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers would run FlashAttention 2 under 3's name at the next attempt: its slot already says 3."""
    with hopper("flash_attention_2", "flash_attention_3"):
        model = axattn.apply(build("llama"), "flash_attention_2", upgrade_flash=False)
        real = fa._lazy_imports

        def fails(name: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "flash_attention_3":
                raise broken
            return real(name, *args, **kwargs)

        monkeypatch.setattr(fa, "_lazy_imports", fails)
        for _ in range(2):
            with pytest.raises(BackendUnavailableError, match="flash_attention_3 fails to load") as caught:
                axattn.apply(model, "flash_attention_3")
            assert caught.value.__cause__ is broken
            assert fa._loaded_implementation == "flash_attention_2"
        assert model.config._attn_implementation == "flash_attention_2"
        flash.calls.clear()
        model(tokens(1, 8))
        assert set(flash.calls) == {"flash_attention_2"}


# ---- what Transformers' flash path would compute otherwise than the masks say ------------------------------------


@pytest.mark.parametrize(
    ("model_type", "auto", "head", "part"),
    [
        ("pegasus_x", tf.AutoModelForSeq2SeqLM, "seq2seq", "is_causal is False"),
        (
            "paligemma",
            tf.AutoModelForImageTextToText,
            "vision",
            r"would attend to later tokens|does not support flash_attention_2",
        ),
        ("t5gemma", tf.AutoModelForSeq2SeqLM, "seq2seq", "reaches 6 tokens to each side, .* flash path 5"),
        (
            "mistral, is_causal=False",
            tf.AutoModelForCausalLM,
            "causal",
            "reaches 6 tokens to each side, .* flash path 5",
        ),
        ("gemma4_text, bidirectional", tf.AutoModel, "none", "reaches 4 tokens to each side, .* flash path 3"),
        ("phimoe, sliding window", tf.AutoModelForCausalLM, "causal", "PhimoeAttention does not pass its window of 6"),
        ("qwen2_moe, sliding window", tf.AutoModelForCausalLM, "causal", "does not pass its window of 6"),
    ],
)
def test_models_whose_attention_modules_contradict_their_masks_are_refused(
    model_type: str, auto: Any, head: str, part: str
) -> None:
    model = auto.from_config(tiny(model_type, head), attn_implementation="eager").eval()
    with hopper("flash_attention_2"):
        with pytest.raises(UnsupportedAttentionError, match=part):
            axattn.apply(model, "flash_attention_2")
        assert model.config._attn_implementation == "eager"  # nothing is left half done
        axattn.apply(model, "auto")


def test_an_attention_module_that_does_not_say_whether_it_is_causal_is_refused() -> None:
    model = build("llama")
    assert not native_names.contradictions(model.model)
    del model.model.layers[1].self_attn.is_causal
    (reason,) = native_names.contradictions(model.model)
    assert "LlamaAttention has no is_causal" in reason.text


def test_a_model_that_takes_neither_flash_name_is_refused_where_the_upgrade_is_there_too() -> None:
    """The second plan, without the upgrade, is asked the same questions as the first."""
    model = tf.AutoModelForMaskedLM.from_config(tiny("layoutlm", "masked"), attn_implementation="eager").eval()
    with hopper(*FLASH), pytest.raises(UnsupportedAttentionError, match="_supports_flash_attn is False"):
        axattn.apply(model, "flash_attention_2")


@torch.no_grad()
def test_as_many_targets_as_padded_source_tokens_are_refused_on_the_flash_path() -> None:
    model = tf.AutoModelForSeq2SeqLM.from_config(tiny("bart", "seq2seq"), attn_implementation="eager").eval()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    with hopper("flash_attention_2"):
        axattn.apply(model, "flash_attention_2")
        with pytest.raises(UnsupportedAttentionError, match="as many targets as source tokens"):
            model(ids, attention_mask=mask, decoder_input_ids=tokens(2, 9, 5))
        assert model(ids, attention_mask=mask, decoder_input_ids=tokens(2, 7, 5)).logits.isfinite().all()
        assert model(ids, decoder_input_ids=tokens(2, 9, 5)).logits.isfinite().all()


@torch.no_grad()
def test_planes_of_positions_are_not_taken_for_documents_of_one_row() -> None:
    model = tf.AutoModelForImageTextToText.from_config(tiny("glm4v_moe", "vision"), attn_implementation="eager").eval()
    with hopper("flash_attention_2"):
        axattn.apply(model, "flash_attention_2")
        with pytest.raises(
            UnsupportedAttentionError, match=r"planes of positions for .* tokens, and would read past its row"
        ):
            model(input_ids=tokens(1, 9), use_cache=False)
        assert model(input_ids=tokens(2, 9), use_cache=False).logits.isfinite().all()
