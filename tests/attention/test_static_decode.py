"""Static caches, as `generate` compiles their decoding by itself on a GPU; graphs that are given copies of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch._dynamo.backends.debugging import aot_eager

import axattn
from axattn.hf.graph_handles import entry_of, new_handle
from axattn.masks.lazy_mask import LazyMask
from tests.models import build, positions, tokens
from tests.parallel_jobs import compare, gradients
from tests.sampling import part_of


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


class Copying:
    """A compiler that counts its graphs, and copies their inputs as CUDA graphs do: into buffers of its own, or new
    ones where backward is still to read the last."""

    def __init__(self, fresh: bool = False, compiler: Any = None) -> None:
        self.graphs, self.fresh, self.compiler = 0, fresh, compiler

    def __deepcopy__(self, memo: Any) -> Copying:
        return self  # `CompileConfig` copies what it passes to torch.compile

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        buffers: dict[Any, torch.Tensor] = {}
        run = graph if self.compiler is None else self.compiler(graph, inputs)

        def copied(at: int, x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, torch.nn.Parameter) or x.requires_grad:
                return x
            if hasattr(x, "_dynamo_static_input_type"):  # a static cache: its address is the same at each call
                return x
            if self.fresh or (at, x.shape) not in buffers:
                buffers[at, x.shape] = torch.empty_like(x)
            return buffers[at, x.shape].copy_(x)

        return lambda *given: run(*(copied(at, x) for at, x in enumerate(given)))


def decode(model: Any, ids: torch.Tensor, compiler: Any, dynamic: bool | None = None, **given: Any) -> torch.Tensor:
    model.__dict__.pop("_compiled_call", None)
    torch._dynamo.reset()
    how = tf.CompileConfig(fullgraph=True, dynamic=dynamic, backend=compiler, mode=None)
    how._compile_all_devices = True
    out: torch.Tensor = model.generate(
        ids,
        do_sample=False,
        max_new_tokens=6,
        cache_implementation="static",
        compile_config=how,
        eos_token_id=None,
        pad_token_id=0,
        **given,
    )
    return out


@pytest.mark.parametrize(("family", "padded"), part_of([("llama", True), ("gemma3", False)], kept=[("llama", True)]))
def test_decoding_compiles_as_often_as_stock_and_gives_its_tokens(family: str, padded: bool) -> None:
    model = build(family, **({"sliding_window": 9} if family == "gemma3" else {}))  # passed in the middle
    ids, given = tokens(2, 6), {}
    if padded:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][0, :3] = 0
    model.set_attn_implementation("sdpa")
    dynamic = False if family == "llama" else None  # with a window stock compiles each step where dynamic is False
    stock, on_axattn = Copying(), Copying()
    expected = decode(model, ids, stock, dynamic, **given)
    axattn.apply(model, "auto")
    assert torch.equal(decode(model, ids, on_axattn, dynamic, **given), expected)
    assert on_axattn.graphs == stock.graphs > 0


@pytest.mark.nightly
def test_images_compile_too() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    text = sizes | {"vocab_size": 99, "vocab_size_per_layer_input": 99, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"global_head_dim": 16, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "sliding_window": 32}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "use_bidirectional_attention": "vision"}
    vision = sizes | {"intermediate_size": 32, "num_hidden_layers": 1, "patch_size": 4, "pooling_kernel_size": 1}
    named = {"image_token_id": 4, "video_token_id": 7, "audio_token_id": 8, "boi_token_id": 5, "eoi_token_id": 6}
    torch.manual_seed(0)
    model = tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **named)
    ).eval()
    ids = tokens(2, 10).clamp(min=10)
    kind = torch.zeros_like(ids)
    kind[:, 2:5] = 1
    stock, on_axattn = Copying(), Copying(compiler=aot_eager)  # vmap works in operators without it
    expected = decode(model, ids, stock, mm_token_type_ids=kind)
    axattn.apply(model, "auto")
    assert torch.equal(decode(model, ids, on_axattn, mm_token_type_ids=kind), expected)
    assert on_axattn.graphs == stock.graphs > 0


@torch.no_grad()
@pytest.mark.parametrize("broken", part_of([False, True], kept=[False]))
def test_a_static_cache_in_a_compiled_model(broken: bool) -> None:
    """A loop of one's own: the masks are made in the graph, which may break before the layers read them."""
    model = axattn.apply(build("llama", num_hidden_layers=1), "varlen")
    ids = tokens(2, 9)
    expected = model(ids, use_cache=False).logits
    counted = Copying()
    if broken:
        model.model.layers[0].register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend=counted, fullgraph=not broken, dynamic=False)
    cache = tf.StaticCache(model.config, max_cache_len=12)
    model(ids[:, :4], past_key_values=cache)
    for at in range(4, 9):
        found = compiled(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
        assert torch.allclose(found[:, 0], expected[:, at], atol=1e-5)
    assert broken or counted.graphs == 1


def test_compiled_layers_find_their_mask_from_copies_of_its_handle() -> None:
    reference, model = (axattn.apply(build("llama"), "varlen").train() for _ in range(2))
    counted = Copying(fresh=True)
    for layer in model.model.layers:
        layer.compile(backend=counted, fullgraph=True)
    for lengths in ((7, 11, 3), (4, 17), (21,)):
        for one in (reference, model):
            one.zero_grad()
            out = one(tokens(1, 21), position_ids=positions(lengths), use_cache=False).logits
            out.square().sum().backward()
        assert compare(gradients(model), gradients(reference)) < 1e-5
    assert counted.graphs <= 2  # plain rows have no documents


def test_operators_that_read_on_the_host_are_kept_out_of_cuda_graphs() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("axattn::")}
    assert len(names) >= 7
    operators = {name: getattr(torch.ops.axattn, name.split("::")[1]).default for name in names}
    tagged = {name for name, operator in operators.items() if torch.Tag.cudagraph_unsafe in operator.tags}
    assert names - tagged <= {"axattn::int8_attention"}  # launches kernels only


def test_a_mask_over_a_static_cache_reads_its_offset_when_eager_asks() -> None:
    """`generate` builds it before the forward, and the cache counts on in place."""
    from axattn.masks.mask_interface import lazy_mask

    offset = torch.tensor(4)
    mask = lazy_mask(2, 1, 8, q_offset=offset)
    offset += 3
    assert isinstance(mask, LazyMask)
    assert mask.q_offset == 4
    assert mask.dense()[0, 0, 0].tolist() == [True] * 5 + [False] * 3


def test_a_buffer_that_holds_another_handle_leads_to_another_object() -> None:
    first, second = new_handle("first"), new_handle("second")
    buffer = first.clone()
    assert entry_of(buffer).value == "first"
    buffer.copy_(second)
    assert entry_of(buffer).value == "second"
    buffer.copy_(first)
    del first
    with pytest.raises(RuntimeError, match="mask of this call is gone"):
        entry_of(buffer)
