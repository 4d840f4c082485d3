"""Random batches of documents, with padding and with stems, for tests of placements and plans. No test lives here."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from axattn.documents.boundaries import Ranges, cut, total
from axattn.documents.placement import Document
from axattn.parallel.fetch_plan import Rule


@dataclass(frozen=True)
class Case:
    """Documents of a batch, on ranks.

    Attributes:
        documents: disjoint.
        tokens: of the batch, with padding.
        ranks: P.
        multiple: of `axattn.documents.placement.place`.
        rule: of a layer.
    """

    documents: tuple[Document, ...]
    tokens: int
    ranks: int
    multiple: int
    rule: Rule


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to six documents, with padding between and inside them; some go on from others."""
    documents: list[Document] = []
    paths: list[Ranges] = []
    at = draw(st.integers(0, 2))
    for _ in range(draw(st.integers(1, 6))):
        own = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            length = draw(st.integers(1, 12))
            own.append((at, at + length))
            at += length + draw(st.sampled_from([0, 0, 1, 3]))
        stem: Ranges = ()
        if paths and draw(st.booleans()):
            other = draw(st.sampled_from(paths))
            stem = cut(other, 0, draw(st.integers(1, total(other))))
        documents.append(Document(tuple(own), stem))
        paths.append((*stem, *own))
    causal = draw(st.sampled_from([True, True, True, False])) or any(one.stem for one in documents)
    window = draw(st.none() | st.integers(1, 9)) if causal else None
    chunk = draw(st.none() | st.integers(2, 9)) if causal and window is None else None
    rule = Rule(causal, window, chunk)
    return Case(tuple(documents), at, draw(st.integers(1, 4)), draw(st.integers(1, 3)), rule)
