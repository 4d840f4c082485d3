"""Rows split over two and four processes: outputs and gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.utils import ModelOutput

from axattn.documents.sequence_shard import SequenceShard
from axattn.errors import InvalidInputError, UnsupportedAttentionError
from axattn.parallel import accelerate_config, estimate
from axattn.parallel.estimates import table
from axattn.parallel.split_inputs import join
from axattn.parallel.ulysses import repeats
from tests import parallel_jobs as jobs
from tests.distributed import run
from tests.forked import FORKED
from tests.models import CONFIGS
from tests.sampling import part_of

pytestmark = FORKED

BUDGET = 1e-5
CASES = [("llama", "varlen", "varlen", scenario) for scenario in jobs.SCENARIOS]
CASES += [(family, "auto", "", "packed") for family in CONFIGS if family != "llama"]
CASES += [(family, "auto", "", "right padded") for family in ("mistral", "gemma2", "gpt_oss", "llama4", "gemma3")]
FAKES = [
    ("llama", "sage", "[sage]", "packed"),
    ("llama", "fp8", "[fp8]", "packed"),
    ("llama", "auto", "[flash_attention_3]", "packed uneven"),
    ("mistral", "auto", "[flash_attention_3]", "right padded"),
    ("gpt_oss", "auto", "[flash_attention_3]", "packed"),
    ("gpt_oss", "sage", "[sage]", "packed"),
]


@pytest.mark.parametrize(("world", "share"), part_of([(2, 1), (4, 1), (2, 3), (4, 5)], kept=[(4, 5)]))
def test_outputs_and_gradients_equal_those_of_one_process(world: int, share: int) -> None:
    cases = CASES[share // 2 :: share]
    for found in run(world, jobs.errors, cases):
        assert len(found) == len(cases)
        assert not {key: value for key, value in found.items() if isinstance(value, str) or not value < BUDGET}


def test_kernels_of_libraries_run_on_whole_rows_too() -> None:
    for found in run(2, jobs.errors, FAKES):
        assert not {key: value for key, value in found.items() if isinstance(value, str) or not value < 1e-4}


ORDERS = [(order, strategy) for strategy in ("fetch", "ulysses") for order in ("before", "after")]


@pytest.mark.parametrize(("order", "strategy"), part_of(ORDERS, kept=[("before", "fetch")]))
def test_two_dimensions_with_fsdp(order: str, strategy: str) -> None:
    for loss, gradient in run(4, jobs.two_dimensions, order, strategy):
        assert loss < BUDGET
        assert gradient < BUDGET


def test_a_lora_model_inside_ddp() -> None:
    for loss, gradient in run(2, jobs.with_lora):
        assert loss < BUDGET
        assert gradient < BUDGET


def test_models_without_a_head() -> None:
    for found in run(2, jobs.without_heads):
        assert not {what: error for what, error in found.items() if not error < 1e-4}


def test_what_comes_back() -> None:
    for found in run(2, jobs.outputs):
        assert found.pop("training") == [1, 12, 97]  # this rank's part: the loss is all that training needs
        *shapes, refusal = found.pop("switched")
        assert shapes == [[1, 12, 97]] * 4
        assert "eager is called by Transformers" in refusal
        assert "axattn.restore(model) removes its sequence parallelism" in refusal
        assert found.pop("generate")
        assert not found.pop("restored")
        assert all(value < BUDGET for value in found.values()), found


def test_a_replaced_forward_is_split_where_it_calls_the_inner_model() -> None:
    for found in run(2, jobs.passed_by):
        assert found["error"] < BUDGET
        assert found["tokens"] == [12]
        assert "TRL's fused head" in found["mean"]
        assert "this batch would not be split over ranks" in found["passed by"]


REFUSED = {
    "native name": "sdpa is called by Transformers",
    "not applied": "it does not run on axattn yet",
    "heads": "3 heads can't be divided among 2 ranks",
    "s2": "s2 treats the halves of the heads differently",
    "rope": "depends on the longest position on a rank",
    "temperature": "counts positions among the tokens that it sees",
    "router": "the balance of experts",
    "one a row": "it gives one output a row",
    "own loss": "computes its loss itself",
    "bamba": "mix tokens outside of attention",
    "twice": "it is sequence-parallel already",
    "group": "group is a str",
    "mesh": "the mesh has 3 dimensions",
    "strategy": "strategy='ring' is not one of",
    "both": "on a mesh of two dimensions, which uses both",
    "both, a state": "mix tokens outside of attention",
    "both sides": "windows to both sides",
    "no stems": "s2 can't attend to keys in several ranges",
    "holes": "padding between the tokens of a document",
    "other batch": "hold different batches",
    "other labels": "they differ in labels",
    "other length": "rank 0: 1 x 24, rank 1: 1 x 25",
    "weights": "the weights of a row are on several ranks",
    "unknown input": "pixel_values: there is no known way to split it",
    "mask": "the mask is not [B, S]",
    "keep": "logits_to_keep counts from the end",
    "pickle": "it holds a process group",
    "after all that": "accepted",
    "a copy": "accepted",
}


def test_what_can_t_be_split_is_refused_with_the_reason_and_leaves_the_model_usable() -> None:
    for found in run(2, jobs.refusals):
        assert found.keys() == REFUSED.keys()
        assert not {what: text for what, text in found.items() if REFUSED[what] not in text}


PARTS = [(parts, strategy) for parts in ("layers", "whole inner") for strategy in ("fetch", "ulysses")]


@pytest.mark.parametrize(("parts", "strategy"), part_of(PARTS, kept=[]))
def test_compiled_as_a_whole_or_in_parts(parts: str, strategy: str) -> None:
    """A graph breaks at the model's input hook, where documents are read and agreed on; traced, they would be lost."""
    for found in run(2, jobs.compiled, tuple(parts.split()), strategy):
        assert found.keys() == set(parts.split())
        assert all(value < BUDGET for value in found.values()), found


def test_torch_s_own_context_parallel_around_axattns_kernels_is_refused() -> None:
    assert all("context_parallel" in text for text in run(2, jobs.inside_context_parallel))


def test_no_group_without_torch_distributed() -> None:
    import axattn
    from tests.models import build

    with pytest.raises(InvalidInputError, match="torchrun"):
        axattn.sequence_parallel(axattn.apply(build("llama"), "varlen"), None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "times"),
    [
        (8, 2, 2, 1),
        (8, 2, 4, 2),
        (8, 1, 8, 8),
        (24, 6, 4, 2),
        (32, 8, 8, 1),
        (12, 3, 4, 4),
        (12, 4, 6, 3),
        (8, 8, 4, 1),
    ],
)
def test_kv_heads_are_repeated_no_more_than_needed_and_meet_their_queries(
    heads: int, kv_heads: int, ranks: int, times: int
) -> None:
    assert repeats(heads, kv_heads, ranks) == times
    owner = torch.arange(kv_heads).repeat_interleave(times)
    for rank in range(ranks):
        mine = owner.view(ranks, -1)[rank].repeat_interleave(heads // (kv_heads * times))
        wanted = torch.arange(heads).view(ranks, -1)[rank] // (heads // kv_heads)
        assert torch.equal(mine, wanted)


def test_a_config_of_accelerate_names_an_axattn_backend() -> None:
    pytest.importorskip("accelerate")
    config = accelerate_config(2, dp_shard_size=2)
    assert (config.cp_size, config.dp_shard_size, config.cp_backend) == (2, 2, "axattn")
    with pytest.raises(InvalidInputError, match="sp_size"):
        accelerate_config(2, sp_size=2)


def test_the_arithmetic_counts_weights_and_halves_with_twice_the_ranks() -> None:
    config: Any = CONFIGS["llama"]()
    weights = sum(p.numel() for p in tf.LlamaForCausalLM(config).parameters())
    one, two = (estimate(config, 1024, ranks, strategy="ulysses") for ranks in (1, 2))
    assert one.states == 16 * weights
    assert one.sent == 0
    assert two.states * 2 == one.states
    assert two.checkpoints * 2 == one.checkpoints
    q, kv = 32, 16  # heads x head_dim
    assert two.sent == 2 * 3 * 512 * (2 * q + 2 * kv) * 2 // 2
    with pytest.raises(ValueError, match="can't be divided"):
        estimate(config, 1024, 3, strategy="ulysses")


def big(layers: int, heads: int, width: int, inner: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 128256}
    return tf.LlamaConfig(num_attention_heads=heads, num_key_value_heads=8, **sizes)


def test_the_page_s_tables_are_those_of_the_formulas() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text()
    for config in (big(32, 32, 4096, 14336), big(80, 64, 8192, 28672)):
        assert table(config, (131_072, 1_048_576), (8, 64, 512)) in page


def test_an_output_that_may_hold_a_value_for_each_token_of_a_rank_is_not_taken_for_whole() -> None:
    share = SequenceShard(None, 2, 0, 1, 10, None, None)
    join(ModelOutput(score=torch.zeros(1, 3), loss=torch.zeros(())), share, 1, 9)
    for part in (torch.zeros(1, 5, 3), (torch.zeros(1, 5),)):
        with pytest.raises(UnsupportedAttentionError, match="its output score is unknown and can't be gathered"):
            join(ModelOutput(score=part), share, 1, 9)
