"""What each rank fetches, and the mask of its queries: against a dense mask of the whole batch."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import numpy as np
import torch
from hypothesis import given

from axattn.documents.placement import Document, place
from axattn.parallel.fetch_plan import Rule, fetched, layout_of
from axattn.parallel.strategy import LayerSizes, fetch_values, ulysses_values
from tests.documents.test_placement import log_normal, rows
from tests.parallel.trees import Case, cases


def allowed(case: Case) -> np.ndarray:
    """bool ``[tokens, tokens]``: what attends to what, by the definition."""
    found = np.zeros((case.tokens, case.tokens), dtype=bool)
    for document in case.documents:
        path = [t for a, b in (*document.stem, *document.own) for t in range(a, b)]
        own = sum(b - a for a, b in document.own)
        for q, key in itertools.product(range(len(path) - own, len(path)), range(len(path))):
            seen = not case.rule.causal or key <= q
            seen = seen and (case.rule.window is None or q - key < case.rule.window)
            seen = seen and (case.rule.chunk is None or q // case.rule.chunk == key // case.rule.chunk)
            found[path[q], path[key]] = seen
    return found


@given(cases())
def test_a_rank_s_queries_see_what_they_see_in_the_whole_batch_and_nothing_else_is_sent(case: Case) -> None:
    placed = place(case.documents, case.tokens, case.ranks, case.multiple)
    wanted, lists = allowed(case), fetched(placed, case.rule)
    for rank in range(case.ranks):
        layout = layout_of(placed, rank, case.rule, lists[rank])
        held = placed.held(rank)
        padding = [-1] * (placed.slots - len(held))
        keys = [*held.tolist(), *padding, *lists[rank].tolist()]
        dense = layout.dense(torch.device("cpu"))[0, 0].numpy()
        assert dense.shape == (placed.slots, len(keys))
        found = np.zeros((len(held), case.tokens), dtype=bool)
        for column, token in enumerate(keys):
            if token < 0:
                assert not dense[:, column].any()
            else:
                found[:, token] |= dense[: len(held), column]
        assert (found == wanted[held]).all()
        assert not dense[len(held) :].any()
        seen = set(np.flatnonzero(wanted[held].any(0)).tolist())
        assert set(lists[rank].tolist()) == seen - set(held.tolist())
        assert (np.diff(placed.owner[lists[rank]]) >= 0).all()


def test_a_layout_is_of_spans_along_stems_and_no_larger_than_its_queries_need() -> None:
    placed = place(rows([64]), 64, 2)
    for rank in range(2):
        lists = fetched(placed, Rule(window=4))
        layout = layout_of(placed, rank, Rule(window=4), lists[rank])
        assert len(lists[rank]) <= 6
        assert layout.window == 4
        assert sum(span.q1 - span.q0 for span in layout.spans) == 32


def llama(layers: int = 32) -> list[LayerSizes]:
    """The attention layers of Llama 3 8B."""
    return [LayerSizes(32, 8, 128, 128)] * layers


def test_packed_rows_send_a_tenth_and_one_long_document_sends_more() -> None:
    """At 8 ranks, 131,072 tokens; documents of about a thousand tokens, and one."""
    tokens, ranks = 131_072, 8
    heads = ulysses_values(llama(), tokens // ranks, ranks)
    assert heads == 32 * (tokens // ranks) * (2 * 32 * 128 + 2 * 8 * 128) * 7 // 8
    placed = [place(rows(log_normal(tokens, 1_000, seed)), tokens, ranks) for seed in range(5)]
    assert statistics.median(fetch_values(llama(), one) for one in placed) <= heads / 10  # of the busiest rank
    keys = statistics.median(sum(map(len, fetched(one, Rule()))) / ranks for one in placed)
    assert keys * 32 * llama()[0].kv_values <= heads / 20  # of all
    assert fetch_values(llama(), place(rows([1024] * 128), tokens, ranks)) == 0
    whole = fetch_values(llama(), place(rows([tokens]), tokens, ranks))
    assert heads < whole < 2 * heads


def test_windows_are_sent_once_for_all_layers_of_their_kind() -> None:
    placed = place(rows([256]), 256, 2)
    full, narrow = LayerSizes(4, 2, 8, 8), LayerSizes(4, 2, 8, 8, Rule(window=16))
    one, both = fetch_values([narrow], placed), fetch_values([full, narrow, narrow], placed)
    assert both == fetch_values([full], placed) + 2 * one
    assert one <= 3 * 15 * 2 * 16


def test_values_with_other_sizes_than_keys() -> None:
    placed = place([Document(((0, 32),))], 32, 2)
    keys = max(map(len, fetched(placed, Rule())))
    sizes: Any = LayerSizes(8, 4, 24, 16)
    assert fetch_values([sizes], placed) == keys * 4 * (24 + 16)
