"""What every kernel serves and needs, as a Markdown page made of the records that the planner reads."""

from __future__ import annotations

import dataclasses

from axattn import backends
from axattn.backends.base import Backend
from axattn.backends.ranking import PREFERENCES, ranking
from axattn.capability import Capability
from axattn.environment import Environment
from axattn.machines import EVERY_LIBRARY
from axattn.names import WITHOUT_A_CACHE

_MACHINES: tuple[tuple[str, Environment], ...] = (
    ("CPU", Environment("cpu")),
    ("Turing (sm75)", Environment("cuda", (7, 5), cuda="12.8")),
    ("Ampere (sm80)", Environment("cuda", (8, 0), cuda="12.8")),
    ("Ada (sm89)", Environment("cuda", (8, 9), cuda="12.8")),
    ("Hopper (sm90)", Environment("cuda", (9, 0), cuda="12.8")),
    ("Blackwell (sm100)", Environment("cuda", (10, 0), cuda="12.8")),
    ("ROCm 6", Environment("rocm", rocm="6.2")),
)
_LABELS = {
    "value_dim_differs": "value heads of another size",
    "value_dim_padded": "(widened to the query heads')",
    "grouped_heads": "grouped heads (GQA, MQA)",
    "causal": "causal",
    "bidirectional": "bidirectional",
    "window": "sliding window",
    "chunk": "chunked attention (Llama 4)",
    "softcap": "softcap (Gemma 2)",
    "sinks": "attention sinks (gpt-oss)",
    "bias": "position bias (T5)",
    "sparse": "sparse indices (DeepSeek-V3.2)",
    "dropout": "attention dropout",
    "dense_mask": "any 4-D mask",
    "padding": "padding",
    "holes": "padding between real tokens",
    "segments": "packed documents, called by axattn",
    "cross_lengths": "decoding, cross-attention",
    "gradient": "gradient",
    "deterministic": "deterministic gradient (`torch.use_deterministic_algorithms`)",
    "second_gradient": "its own gradient (`create_graph=True`)",
    "weights": "attention weights",
    "traced": "inside `torch.compile`",
}


def page() -> str:
    """The page, ``docs/backends.md``."""
    found = [backends.get(name) for name in backends.builtin_names()]
    lines = ["# Kernels", "", "Made by `make docs` from the capability records in `axattn/backends/`; do not edit.", ""]
    lines += ["## What each serves", "", *_table("feature", found, _features(found)), ""]
    lines += [f"Without a cache: {WITHOUT_A_CACHE}. `axattn doctor` says the same.", ""]
    lines += ["The flag `attn_supports_packing` answers as axolotl does: no for `eager`, `sdpa` and `s2`.", ""]
    lines += ["## What is not served together", "", "Each part is served, on the machines named.", ""]
    lines += [f"- `{backend.name}`: {clause}" for backend in found for clause in _refused(backend)]
    lines += ["", "## Where each runs, with its library installed", "", *_table("machine", found, _machines(found)), ""]
    lines += ["## What `auto` tries, in this order", "", "The first that is installed and serves the layer.", ""]
    for label, machine in _MACHINES:
        ranks = "; ".join(f"`{rank.name}` ({rank.source})" for rank in ranking(machine))
        lines.append(f"- **{label}**: {ranks}.")
    for rule in PREFERENCES:
        lines.append(f"- `{rule.name}` goes before `{rule.before}` where it is cheaper: {rule.source}.")
    lines += ["", "## Install, and what to know", ""]
    for backend in found:
        notes = [f"{key}: {text}" if key else text for key, text in backend.capability.notes.items()]
        install = f" Needs {needs}." if (needs := _needs(backend)) else ""
        install += f" Install: `{backend.install}`." if backend.install else ""
        shown = f" Notes: {'; '.join(notes)}." if notes else ""
        choices = [f"`{option.name}`, {option.meaning} (default `{option.default!r}`)" for option in backend.options]
        shown += f" Options: {'; '.join(choices)}." if choices else ""
        lines.append(f"- **`{backend.name}`**: {backend.summary}.{install}{shown}")
    return "\n".join(lines) + "\n"


def _table(first: str, found: list[Backend], rows: list[tuple[str, list[str]]]) -> list[str]:
    head = [f"| {first} | " + " | ".join(f"`{backend.name}`" for backend in found) + " |"]
    return [*head, "|---|" + "---|" * len(found), *(f"| {label} | {' | '.join(cells)} |" for label, cells in rows)]


def _features(found: list[Backend]) -> list[tuple[str, list[str]]]:
    records = [backend.capability for backend in found]
    rows = [("exact", [_mark(record.exactness == "exact") for record in records])]
    rows.append(("dtypes", [", ".join(sorted(_short(name) for name in record.dtypes)) for record in records]))
    rows.append(("head dims", [_head_dims(record) for record in records]))
    for name in records[0].features():
        rows.append((_LABELS[name], [_mark(record.features()[name]) for record in records]))
        if name == "segments":
            rows.append(("packed documents, as a name of its own", [_packs(backend.name) for backend in found]))
    return rows


def _refused(backend: Backend) -> list[str]:
    """The combinations that a kernel refuses, each with the machines where it does."""
    where: dict[str, list[str]] = {}
    runs = [(label, found) for label, found in _everywhere() if not _ruled_out(backend, found)]
    for label, machine in runs:
        for refused in backend.capability_on(machine).refuses:
            where.setdefault(f"{refused.together()} ({refused.why})", []).append(label)
    return [
        f"{clause}{'' if len(labels) == len(runs) else ': ' + ', '.join(labels)}." for clause, labels in where.items()
    ]


def _packs(name: str) -> str:
    return "-" if backends.packs(name) == "no" else backends.packs(name)


def _machines(found: list[Backend]) -> list[tuple[str, list[str]]]:
    return [(label, [_mark(not _ruled_out(backend, machine)) for backend in found]) for label, machine in _everywhere()]


def _everywhere() -> list[tuple[str, Environment]]:
    return [(label, dataclasses.replace(machine, libraries=EVERY_LIBRARY)) for label, machine in _MACHINES]


def _ruled_out(backend: Backend, machine: Environment) -> bool:
    """Whether a kernel can't run on a machine that has every library."""
    if machine.torch_device not in backend.capability.devices:
        return True
    return any(reason.feature in ("gpu", "version") for reason in backend.probe(machine))


def _needs(backend: Backend) -> str:
    """Libraries and their floors, as the probe names them on a machine where everything is too old or absent."""
    machine = Environment("cuda", (9, 0), cuda="13.0")
    found: list[str] = []
    for libraries in (dict.fromkeys(EVERY_LIBRARY, "0"), {}):
        for reason in backend.probe(dataclasses.replace(machine, libraries=libraries)):
            floor, absent = " 0 is older than ", " is not installed"
            text = reason.text.replace(floor, " ≥ ").removesuffix(absent)
            if text != reason.text and not any(text in other for other in found):
                found.append(text)
    return ", ".join(found)


def _mark(served: bool) -> str:
    return "yes" if served else "-"


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def _head_dims(record: Capability) -> str:
    if record.head_dims is not None:
        return ", ".join(str(size) for size in sorted(record.head_dims))
    limit = "any" if record.max_head_dim is None else f"up to {record.max_head_dim}"
    return limit if record.head_dim_multiple == 1 else f"{limit}, multiples of {record.head_dim_multiple}"


if __name__ == "__main__":
    print(page(), end="")
