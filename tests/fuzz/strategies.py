"""How examples are drawn: every legal combination, and none whose documents nothing describes."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.chat import Chat, Prompt
from tests.fuzz.example import CacheUse, Example, Row
from tests.fuzz.families import ENCODERS, FAMILIES, LENGTHS, MATRIX

NAMES = ("auto", "auto", "auto", "varlen", "sdpa", "eager")
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS)
ROUNDED = tuple(name for name in FAMILIES if name not in MATRIX or not MATRIX[name].experts)
"""Families whose output is near in half precision too: no router picks another expert for a rounding."""
CHATTING = tuple(name for name in DECODERS if name not in ("lfm2", "qwen3_next"))
"""Whose cache holds keys and values only: states of other layers can't be cropped or rebuilt."""
WINDOWED = ("mistral", "gemma2", "gemma3", "gemma3_vl", "gpt_oss", "llama4")
PADDED = ("nothing", "positions and mask", "document ids", "document ids and positions", "lengths", "index and mask")
STEPS = ("apply again", "restore and apply", "using", "deepcopy", "pickle")
_lengths = st.one_of(st.integers(1, 9), st.integers(1, 9), st.integers(10, 24))
_gaps = st.sampled_from((0, 0, 0, 1, 3))
_rarely = st.sampled_from((False, False, False, True))


def _caches(family: str) -> tuple[CacheUse, ...]:
    if family in ENCODERS:
        return ("default",)
    return ("default", "default", "off", "empty", *(("reset", "cropped") if family in CHATTING else ()))


@st.composite
def _row(draw: Any, packs: bool, pads: bool, sizes: st.SearchStrategy[int]) -> Row:
    many = draw(st.integers(1, 4)) if packs else 1
    return tuple((draw(_gaps) if pads else 0, draw(sizes)) for _ in range(many))


def _positions_separate(example: Example) -> bool:
    """Whether positions differ where documents do: the next one does not go on where the last one ended."""
    last = None
    for row, a, b in example.documents:
        if last is not None and last[0] == row and int(example.where[row, a]) == last[1] + 1:
            return False
        last = row, int(example.where[row, a:b][example.real[row, a:b] == 1][-1])
    return True


@st.composite
def examples(draw: Any) -> Example:
    """One forward, or forward and backward."""
    family = draw(st.sampled_from(tuple(FAMILIES)))
    ways = [
        "nothing",
        "positions",
        "positions and mask",
        "document ids",
        "document ids and positions",
        "index",
        "index and mask",
    ]
    described_by: Any = draw(st.sampled_from([*ways, "collator", *(["lengths"] if family in LENGTHS else [])]))
    packs, pads = described_by != "nothing", described_by in PADDED
    # past its 16 positions dynamic NTK keeps what the longest row of an earlier forward gave it: no oracle
    short = family == "llama, dynamic rope"
    sizes = st.integers(1, 9) if short else _lengths
    many = 1 if described_by == "collator" or (short and not pads) else draw(st.integers(1, 3))
    rows = [draw(_row(packs, pads, sizes)) for _ in range(many)]
    if not pads:  # rows of one length: the last document takes what is missing
        longest = max(sum(tokens for _, tokens in row) for row in rows)
        rows = [(*row[:-1], (0, row[-1][1] + longest - sum(n for _, n in row))) for row in rows]
    decodes, rounds = family in DECODERS, family in ROUNDED
    kinds = ["float32", "float32", "float32"]
    kinds += ["float64", "bfloat16", "autocast", "autocast over float64"] if rounds else []
    training: Any = draw(st.sampled_from(("no", "no", "no", "plain", "checkpointing", "reentrant checkpointing")))
    number: Any = draw(st.sampled_from(kinds))
    example = Example(
        family=family,
        name=draw(st.sampled_from(NAMES)),
        rows=tuple(rows),
        described_by=described_by,
        giver=draw(st.sampled_from(("caller", "caller", "caller", "hook", "inner hook", "inner forward"))),
        starts=draw(st.sampled_from(((0,), (0,), (0,), (3,), (2, 0, 17)))) if "positions" in described_by else (0,),
        hole=draw(_rarely)
        if described_by in ("nothing", "positions and mask", "document ids and positions")
        else False,
        mask=draw(st.sampled_from(("int64", "int64", "int32", "float32", "bool"))),
        positions=draw(st.sampled_from(("int64", "int64", "int32"))),
        strided=draw(_rarely),
        embeds=draw(_rarely),
        lengths=family in LENGTHS and draw(st.booleans()),
        labels=decodes and training == "no" and any(n > 1 for row in rows for _, n in row) and draw(_rarely),
        cache=draw(st.sampled_from(_caches(family))),
        training=training if number in ("float32", "float64") else "no",
        number=number,
        unpad=draw(_rarely),
        steps=tuple(draw(st.lists(st.sampled_from(STEPS), max_size=2))) if draw(_rarely) else (),
        seed=draw(st.integers(1, 5)),
    )
    if example.training != "no" and example.cache not in ("default", "off"):
        example = dataclasses.replace(example, cache="off")
    if example.described_by.startswith("document ids") and example.mask == "bool":
        example = dataclasses.replace(example, mask="int64")
    return (
        example
        if "positions" not in described_by or _positions_separate(example)
        else dataclasses.replace(example, starts=(0,), hole=False)
    )


@st.composite
def chats(draw: Any) -> Chat:
    """Several calls over one cache."""
    family = draw(st.sampled_from(CHATTING))
    many = draw(st.integers(1, 3))
    # where windows leave padding after a row nothing but padding to see, kernels differ in what it gets
    sides = ("left", "left", "hole", *(("right",) if family not in WINDOWED else ()))
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        side = draw(st.sampled_from(sides))
        turns.append(Prompt(tuple(draw(st.integers(1, 8)) for _ in range(many)), side))
    return Chat(
        family=family,
        name=draw(st.sampled_from(NAMES)),
        turns=tuple(turns),
        packed=len(turns) > 1 and draw(_rarely),
        kind=draw(st.sampled_from(("dynamic", "dynamic", "static"))),
        between=draw(
            st.sampled_from(("nothing", "nothing", "copy", "deepcopy", "reorder", "rebuilt", "reset", "crop"))
        ),
        last=draw(st.sampled_from(("forward", "generate", "beams"))),
        seed=draw(st.integers(1, 5)),
    )
