"""Which tokens of a batch run once, and the masks of documents that go on from others."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axattn.backends.varlen_engine.cpu_tiles import attention_over_tiles
from axattn.backends.varlen_engine.packed import packed_call
from axattn.documents.boundaries import Segments, cut, total
from axattn.documents.document_rows import as_rows
from axattn.hf.mask_functions import Pattern
from axattn.masks.lazy_mask import LazyMask
from axattn.masks.mask_interface import _along_stems
from axattn.unpadding import prefixes
from axattn.unpadding.prefixes import shared_row

CPU = torch.device("cpu")
DOCUMENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=7)


def row_of(documents: list[list[int]], monkeypatch: pytest.MonkeyPatch | None = None) -> Any:
    values = np.array(list(itertools.chain(*documents)), dtype=np.int64)[:, None]
    return shared_row(values, [len(one) for one in documents])


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS)
def test_every_document_can_be_read_along_its_path(documents: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "SHORTEST", 1)
        patch.setattr(prefixes, "WORTH", -1.0)
        row = row_of(documents)
    flat = list(itertools.chain(*documents))
    assert [flat[i] for i in row.tokens[row.source]] == flat
    paths = {}
    for a, b, stem in zip(row.boundaries, row.boundaries[1:], row.stems, strict=False):
        assert all(y <= a for _, y in stem)  # from earlier ones only
        path = [*itertools.chain(*(range(x, y) for x, y in stem)), *range(a, b)]
        for depth, at in enumerate(path):
            paths[at] = path[: depth + 1]
    begin = 0
    beginnings = set()
    for document in documents:
        sources = row.source[begin : begin + len(document)].tolist()
        assert paths[sources[-1]] == sources  # what its last token attends to is the document
        beginnings |= {tuple(document[: n + 1]) for n in range(len(document))}
        begin += len(document)
    assert len(row.tokens) == len(beginnings)  # each beginning once


def test_short_or_rare_beginnings_are_run_again() -> None:
    long = list(range(prefixes.SHORTEST))
    assert row_of([[*long[1:], 90], [*long[1:], 91]]) is None  # one token too short
    row = row_of([[*long, 90], [*long, 91]])
    assert (row.boundaries, row.stems) == ((0, 17, 18), ((), ((0, 16),)))
    others = [list(range(100 + 400 * n, 500 + 400 * n)) for n in range(4)]
    assert row_of([[*long, 90], [*long, 91], *others]) is None  # 16 of 1,634 tokens


def test_equal_documents_run_once() -> None:
    row = row_of([list(range(20))] * 3)
    assert row.boundaries == (0, 20)
    assert row.source.tolist() == list(range(20)) * 3


def test_ranges_are_cut_along_their_order() -> None:
    ranges = ((0, 4), (10, 13), (20, 21))
    assert total(ranges) == 8
    assert cut(ranges, 2, 6) == ((2, 4), (10, 12))
    assert cut(ranges, 4, 4) == ()
    assert cut(ranges, 0, 99) == ranges


TREE = Segments(((0, 5, 8, 12, 13, 17),), CPU, stems=(((), ((0, 3),), ((0, 3), (5, 7)), ((0, 5),), ()),))
"""A second document goes on from token 2 of the first, a third from the middle of the second, a fourth from the end of
the first; the fifth is alone."""
PATTERNS = [
    Pattern(causal=True, window=window, chunk=chunk)
    for window, chunk in ((None, None), (2, None), (4, None), (None, 3))
]


def mask_of(pattern: Pattern) -> LazyMask:
    length = TREE.length
    return LazyMask(
        shape=(1, 1, length, length),
        pattern=pattern,
        segments=TREE,
        padding=None,
        materialise=lambda: _along_stems(TREE, pattern),
        device=CPU,
    )


def by_hand(pattern: Pattern) -> torch.Tensor:
    """bool ``[S, S]``, written down token by token."""
    allowed = torch.zeros(TREE.length, TREE.length, dtype=torch.bool)
    assert TREE.stems is not None
    edges = TREE.boundaries[0]
    for a, b, stem in zip(edges, edges[1:], TREE.stems[0], strict=False):
        path = [*itertools.chain(*(range(x, y) for x, y in stem)), *range(a, b)]
        for depth in range(len(path) - (b - a), len(path)):
            for seen in range(depth + 1):
                near = pattern.window is None or depth - seen < pattern.window
                if near and (pattern.chunk is None or depth // pattern.chunk == seen // pattern.chunk):
                    allowed[path[depth], path[seen]] = True
    return allowed


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_count_along_the_path(pattern: Pattern) -> None:
    mask = mask_of(pattern)
    layout = mask.layout()
    assert layout is not None
    assert torch.equal(mask.dense()[0, 0], by_hand(pattern))
    assert torch.equal(layout.dense(CPU)[0, 0], by_hand(pattern))
    assert TREE.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 5, 6, 7, 8, 5, 0, 1, 2, 3]]


@pytest.mark.parametrize("how", ["tiles", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_both_engines_give_output_and_gradients_of_the_dense_mask(pattern: Pattern, how: str) -> None:
    torch.manual_seed(0)
    shapes = ((1, heads, TREE.length, 8) for heads in (4, 2, 2))
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    layout = mask_of(pattern).layout()
    assert layout is not None

    def kernel(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> torch.Tensor:
        parts = []
        for (a, b), (c, d) in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True):
            rule = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            if pattern.window is not None:
                rule &= torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) - pattern.window + 1)
            one = (x[s:e].transpose(0, 1) for x, s, e in ((q, a, b), (k, c, d), (v, c, d)))
            parts.append(torch.nn.functional.scaled_dot_product_attention(*one, rule, enable_gqa=True).transpose(0, 1))
        return torch.cat(parts)

    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, by_hand(pattern), enable_gqa=True)
    found = attention_over_tiles(q, k, v, layout, 8**-0.5) if how == "tiles" else packed_call(q, k, v, layout, kernel)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-10)
    weight = torch.randn_like(found)
    wanted = torch.autograd.grad((expected.transpose(1, 2) * weight).sum(), (q, k, v))
    for a, b in zip(torch.autograd.grad((found * weight).sum(), (q, k, v)), wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_long_documents_with_stems_are_cut_in_blocks() -> None:
    """Queries of one tile all read its last key, so a tile over a long document would cost twice the causal half."""
    length = 1000
    tree = Segments(((0, 40, 40 + length),), CPU, stems=(((), ((0, 40),)),))
    mask = LazyMask(
        shape=(1, 1, 40 + length, 40 + length),
        pattern=Pattern(causal=True),
        segments=tree,
        padding=None,
        materialise=lambda: _along_stems(tree, None),
        device=CPU,
    )
    layout = mask.layout()
    assert layout is not None
    from axattn.backends.varlen_engine.cpu_tiles import cut_tiles

    work = sum((tile.q1 - tile.q0) * tile.keys for tile in cut_tiles(layout))
    assert work < 0.7 * length * (40 + length)
    q, k, v = (torch.randn(1, 2, 40 + length, 8) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.dense())
    assert torch.allclose(attention_over_tiles(q, k, v, layout, 8**-0.5), expected.transpose(1, 2), atol=1e-5)


def test_rows_of_layers_with_a_state_begin_with_the_stem() -> None:
    x = torch.arange(TREE.length)
    documents = as_rows(TREE, CPU)
    parts = []
    for group in documents.groups:
        rows = x[group.tokens]
        parts.append(group.select_real(rows))
    assert torch.equal(documents.in_packed_order(parts), x)
    whole = [
        row[real].tolist() for group in documents.groups for row, real in zip(group.tokens, group.real, strict=True)
    ]
    assert [0, 1, 2, 5, 6, 8, 9, 10, 11] in whole
    assert [0, 1, 2, 3, 4, 12] in whole
