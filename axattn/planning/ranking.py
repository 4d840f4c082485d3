"""The order in which ``auto`` tries kernels on each machine, fastest exact one first, with the source. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from axattn import backends
from axattn.machine.environment import Environment
from axattn.spec.capability import Need


class Rank(NamedTuple):
    """A place in the order.

    Attributes:
        name: the kernel.
        source: why it has this rank: a paper or a measurement.
    """

    name: str
    source: str


class Preference(NamedTuple):
    """A kernel that goes before another for some calls.

    Attributes:
        name: the kernel.
        before: the kernel it goes before.
        when: the needs to which it applies.
        source: why.
    """

    name: str
    before: str
    when: Callable[[Need], bool]
    source: str


_VARLEN = Rank(
    "varlen",
    "torch's FlashAttention 2 (arXiv:2307.08691) over documents; whole rows: torch's choice, cuDNN on sm90, sm100",
)
_FLASH_2 = Rank(
    "flash_attention_2", "the algorithm that varlen runs, and softcap; after varlen, which needs no extra library"
)
_XFORMERS = Rank(
    "xformers", "calls FlashAttention 2 or torch's memory-efficient kernel; repeats grouped heads in training"
)
_LAST = (
    Rank("sdpa", "any mask, as a dense tensor; documents one by one, in padded groups; the kernels above read lengths"),
    Rank("eager", "forms the weights, L x L for each document: serves what no other kernel does"),
)
_CPU = (
    Rank(
        "varlen",
        "measured (benchmarks/results/cpu.json): a packed step 2.8 times as fast as sdpa",
    ),
    *_LAST,
)
_AMPERE = (_VARLEN, _FLASH_2, _XFORMERS, *_LAST)
_HOPPER = (
    Rank("flash_attention_3", "arXiv:2407.08608: 1.5 to 2.0 times FlashAttention 2 on an H100"),
    Rank("flash_attention_4", "the same design for Hopper in CuTe DSL; after 3 until it is measured"),
    *_AMPERE,
)
_BLACKWELL = (
    Rank("flash_attention_4", "the only one written for its tensor memory; the others run Ampere's instructions"),
    *_AMPERE,
)
_SM120 = (
    _VARLEN,
    _FLASH_2,
    Rank(
        "flash_attention_4",
        "runs Ampere's instructions there (flash_fwd_sm120.py), as the two before it: consumer Blackwell has no "
        "tensor memory; and it compiles in its first calls",
    ),
    _XFORMERS,
    *_LAST,
)
_OTHER = (_VARLEN, *_LAST)

PREFERENCES = (
    Preference(
        "flash_attention_2",
        "varlen",
        lambda need: need.dropout > 0 and need.device == "cuda",
        "with dropout varlen runs documents in padded groups on sdpa",
    ),
    Preference(
        "xformers",
        "varlen",
        lambda need: (
            need.device == "cuda" and (need.dropout > 0 or need.dtype == "float32" or (need.head_dim or 0) > 256)
        ),
        "with dropout, in float32 and above head dim 256 varlen runs documents in padded groups on sdpa on CUDA",
    ),
)


def ranking(environment: Environment) -> tuple[Rank, ...]:
    """The order for a machine, installed or not."""
    if environment.device == "rocm":
        return (_VARLEN, _FLASH_2, *_LAST)
    if environment.device != "cuda" or environment.sm is None:
        return _CPU if environment.device == "cpu" else _OTHER
    if environment.sm >= 120:
        return _SM120
    if environment.sm >= 100:
        return _BLACKWELL
    if environment.sm >= 90:
        return _HOPPER
    return _AMPERE


def usable(environment: Environment) -> tuple[str, ...]:
    """The kernels of `ranking` that this machine can run. The same object for the same answer."""
    found = tuple(rank.name for rank in ranking(environment) if not backends.get(rank.name).probe(environment))
    return interned(found)


def interned(order: tuple[str, ...]) -> tuple[str, ...]:
    """An equal tuple, the same object each time, so that candidates compare by identity."""
    return _interned.setdefault(order, order)


_interned: dict[tuple[str, ...], tuple[str, ...]] = {}


def by_need(order: Iterable[str], need: Need) -> tuple[str, ...]:
    """The order for one layer or call: `PREFERENCES` applied."""
    names = list(order)
    for rule in PREFERENCES:
        if rule.name in names and rule.before in names and rule.when(need):
            at = names.index(rule.before)
            if names.index(rule.name) > at:
                names.remove(rule.name)
                names.insert(at, rule.name)
    return tuple(names)
