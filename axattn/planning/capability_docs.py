"""What every kernel serves and needs, as a Markdown page made of the records that the planner reads."""

from __future__ import annotations

import dataclasses

from axattn import backends
from axattn.backends.base import Backend
from axattn.backends.hub_records import FLASH
from axattn.backends.sage import HUB, HUB_ARCHITECTURES
from axattn.hf.flash_stand_ins import KERNELS_WINDOW, stand_in
from axattn.machine.environment import Environment
from axattn.machine.presets import EVERY_LIBRARY
from axattn.planning.ranking import PREFERENCES, ranking
from axattn.spec.capability import Capability
from axattn.spec.names import FLASH as FLASH_NAMES
from axattn.spec.names import HUB_SAGE_REPOSITORIES, WITHOUT_A_CACHE

_MACHINES: tuple[tuple[str, Environment], ...] = (
    ("CPU", Environment("cpu")),
    ("Turing (sm75)", Environment("cuda", (7, 5), cuda="12.8")),
    ("Ampere (sm80)", Environment("cuda", (8, 0), cuda="12.8")),
    ("Ampere (sm86)", Environment("cuda", (8, 6), cuda="12.8")),
    ("Ada (sm89)", Environment("cuda", (8, 9), cuda="12.8")),
    ("Hopper (sm90)", Environment("cuda", (9, 0), cuda="12.8")),
    ("Blackwell (sm100)", Environment("cuda", (10, 0), cuda="12.8")),
    ("Blackwell (sm120)", Environment("cuda", (12, 0), cuda="12.8")),
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
    "non_contiguous_padding": "padding between real tokens",
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
    lines += ["", "## Where less is served", "", "Than the first table says.", ""]
    lines += [f"- `{backend.name}`: {clause}" for backend in found for clause in _less(backend)]
    lines += ["", "## Where each runs, with its library installed", "", *_table("machine", found, _machines(found)), ""]
    lines += ["## What `auto` tries, in this order", "", "The first that is installed and serves the layer.", ""]
    for label, machine in _MACHINES:
        ranks = "; ".join(f"`{rank.name}` ({rank.source})" for rank in ranking(machine))
        lines.append(f"- **{label}**: {ranks}.")
    for rule in PREFERENCES:
        lines.append(f"- `{rule.name}` goes before `{rule.before}` where it is cheaper: {rule.source}.")
    lines += ["", "## Hub kernels", "", *_hub(), ""]
    lines += ["## Install, and what to know", ""]
    for backend in found:
        notes = [f"{key}: {text}" if key else text for key, text in backend.capability.notes.items()]
        install = f" Needs {needs}." if (needs := _needs(backend)) else ""
        install += f" Install: `{backend.install}`." if backend.install else ""
        shown = f" Notes: {'; '.join(notes)}." if notes else ""
        choices = [f"`{option.name}`, {option.meaning} (default `{option.default!r}`)" for option in backend.options]
        shown += f" Options: {'; '.join(choices)}." if choices else ""
        lines.append(f"- **`{backend.name}`**: {backend.summary}.{install}{shown}")
    return "\n".join(lines) + "\n"


_NARROWER = {"sinks": "no sinks", "max_head_dim": "head dims up to {}", "deterministic": "no deterministic gradient"}


def _hub() -> list[str]:
    """A row for each hub kernel that is known, and which of them stand in for a library."""
    head = (
        "hub kernel",
        "device",
        "dtypes",
        "head dims",
        "sinks",
        "window",
        "softcap",
        "dropout",
        "packed",
        "gradient",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, kernel in FLASH.items():
        for device, record in kernel.serves.items():
            where = f"{device}, {kernel.shown_sms()}" if device == "cuda" else device
            lines.append(_hub_row(f"`{name}`: {kernel.summary}", where, record))
    sage = ", ".join(f"sm{sm}" for sm in HUB_ARCHITECTURES)
    for name in sorted(HUB_SAGE_REPOSITORIES):
        blackwell = name.endswith("sage-blackwell")
        why = "refused: it has no `sageattn`" if blackwell else f"cuda, {sage}"
        summary = "SageAttention 3, FP4" if blackwell else "SageAttention 2, INT8"
        lines.append(_hub_row(f"`{name}`: {summary}", why, HUB if not blackwell else Capability()))
    lines += [
        "",
        "`inference`: a backward is refused. A repository that is not here is called with care: no softcap, no ",
    ]
    lines[-1] += (
        "sinks, no dropout, head dims up to 256; what its function does not take is refused where it is loaded."
    )
    notes = [
        *(
            f"`{name}` at {revision}: no {', no '.join(sorted(lacking))}."
            for name, kernel in FLASH.items()
            for revision, lacking in kernel.lacks.items()
        ),
        *(
            f"`{name}`, sm{sm}x: {', '.join(_NARROWER[field].format(value) for field, value in fields.items())}."
            for name, kernel in FLASH.items()
            for sm, fields in kernel.narrower.items()
        ),
        *(
            f"`{name}`: {key}: {text}."
            for name, kernel in FLASH.items()
            for record in kernel.serves.values()
            for key, text in record.notes.items()
        ),
        *(
            f"`{name}` at {', '.join(broken.revisions)}: {broken.refused.together()} is refused ({broken.refused.why}; "
            f"{broken.source}); use {broken.refused.fix}."
            for name, kernel in FLASH.items()
            for broken in kernel.broken
        ),
    ]
    lines += ["", *(f"- {note}" for note in notes), ""]
    lines.append(f"In the place of a library that is absent, with Transformers {EVERY_LIBRARY['transformers']} and ")
    lines[-1] += f"`kernels` ({KERNELS_WINDOW[0][1]}), where the name is asked for and a whole model runs on it:"
    lines.append("")
    bare = {"torch": EVERY_LIBRARY["torch"], "transformers": EVERY_LIBRARY["transformers"]}
    machines = [Environment(device, libraries=bare) for device in ("cuda", "rocm", "xpu")]
    for name in FLASH_NAMES:
        found = [(path, one.device) for one in machines if (path := stand_in(name, one)) is not None]
        shown = [f"`{path}` on {device}" for path, device in found if device in FLASH[path.repository].serves]
        lines.append(f"- `{name}`: {'; '.join(shown)}.")
    return lines


def _hub_row(name: str, where: str, record: Capability) -> str:
    trained = {refused.asks for refused in record.refuses}
    cells = [name, where, ", ".join(sorted(_short(dtype) for dtype in record.dtypes)) or "-", _head_dims(record)]
    for feature in ("sinks", "window", "softcap", "dropout", "segments"):
        only = (feature, "gradient") in trained
        cells.append("inference" if only else _mark(getattr(record, feature)))
    return f"| {' | '.join((*cells, _mark(record.gradient)))} |"


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


def _less(backend: Backend) -> list[str]:
    """What the machines where a kernel runs take away from its column."""
    clauses, usual = [], backend.capability
    for label, machine in _everywhere():
        record = backend.capability_on(machine)
        lost = [f"no {_LABELS[name]}" for name, yes in usual.features().items() if yes and not record.features()[name]]
        if _head_dims(record) != _head_dims(usual):
            lost.append(f"head dims {_head_dims(record)}")
        if lost and not _ruled_out(backend, machine):
            clauses.append(f"{label}: {'; '.join(lost)}.")
    return clauses


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
    if record.head_dim_multiple > 1:
        limit += f", multiples of {record.head_dim_multiple}"
    return "".join([limit, *(f", and {pair[0]} with values of {pair[1]}" for pair in sorted(record.head_dim_pairs))])


if __name__ == "__main__":
    print(page(), end="")
