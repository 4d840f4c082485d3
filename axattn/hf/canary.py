"""The canary: trains and decodes with a two-layer model on versions of Transformers and torch that are not tested.

It is compared with eager at the first load of a model, once per set of versions, in under three seconds; the result is
cached on disk (in ``HF_HOME/axattn``). ``AXATTN_CANARY=off`` skips it. What it finds wrong is refused in this process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axattn.errors import AxattnError
from axattn.hf import contracts
from axattn.hf.caches import caches_in
from axattn.hf.forward_inputs import cache_keyword

logger = logging.getLogger("axattn")

SWITCH = "AXATTN_CANARY"
"""The environment variable that turns the canary off (``off``, ``0``, ``no``, ``false``)."""
TOLERANCE = 1e-4
"""Largest relative error (of norms, in float32) that counts as rounding."""
_LENGTHS = [7, 11]
_WATCHED = ("transformers", "torch")
_checked = False

Apply = Callable[[torch.nn.Module, str], torch.nn.Module]


def check(apply: Apply) -> None:
    """Once per process, if Transformers or torch is newer or older than tested or a contract is broken: log the
    findings of contracts and canary, and refuse from now on what is wrong.

    Args:
        apply: switches a model to a name (`axattn.apply`).
    """
    global _checked  # noqa: PLW0603  # one set of versions a process
    if _checked:
        return
    _checked = True  # the canary loads a model itself
    untested = contracts.untested((package, contracts.version_of(package)) for package in _WATCHED)
    broken = contracts.broken()
    if not untested and not broken:
        return
    checked = contracts.findings(imported_only=True)
    notes = [f"{package} {version} is {what}" for (package, version), what in untested.items()]
    notes.append(f"{len(checked) - len(broken)} of {len(checked)} contracts hold")
    for finding in broken:
        refused = finding.contract.refused
        notes.append(finding.text + (f" ({refused} refused)" if refused else ""))
    wrong: dict[str, str] = {}
    if untested and not is_off():
        outcomes, kept = results(apply)
        wrong = {name: text for name, text in outcomes.items() if text}
        notes.append(_summary(outcomes, kept))
        versions = ", ".join(f"{package} {version}" for package, version in untested)
        for name, text in wrong.items():
            contracts.refuse(REFUSED[name], f"on {versions} {name} rows are wrong ({text})")
    elif untested:
        notes.append(f"the canary is off ({SWITCH})")
    loud = wrong or broken or any(package == "transformers" for package, _ in untested)
    logger.log(logging.WARNING if loud else logging.INFO, "axattn: %s", "; ".join(notes))


def is_off() -> bool:
    """Whether the canary is switched off."""
    return os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false")


def results(apply: Apply) -> tuple[dict[str, str], bool]:
    """The canary's result on the installed versions: the error by scenario, ``""`` if it is right; and whether the
    result is from an earlier run."""
    path, key = _file(), _key()
    known = _read(path)
    if set(known.get(key, ())) == set(SCENARIOS):
        return known[key], True
    found = run(apply)
    _write(path, {**known, key: found})
    return found, False


def run(apply: Apply) -> dict[str, str]:
    """Run every scenario; returns the error by scenario, ``""`` if it is right."""
    with contracts.on_a_cpu_in_float32():
        try:
            subject, reference = _models()
            apply(subject, "auto")
        except Exception as raised:  # see `_outcome`; the load of the user's model must go on
            return dict.fromkeys(SCENARIOS, _text(raised))
        return {name: _outcome(scenario, subject, reference) for name, scenario in SCENARIOS.items()}


def _outcome(scenario: Callable[[Any, Any], float], subject: Any, reference: Any) -> str:
    try:
        error = scenario(subject, reference)
    except Exception as raised:  # an untested Transformers may raise anything
        return _text(raised)
    return "" if error <= TOLERANCE else f"error {error:.2g}"


def _text(raised: Exception) -> str:
    return f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"


# ---- the model and its rows ------------------------------------------------------------------------------------------


def _models() -> tuple[Any, Any]:
    """Two Qwen 2 models with the same weights and a window in the first layer; the second runs on eager."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def config() -> Any:
        return Qwen2Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
            attention_dropout=0.0,
        )

    torch.manual_seed(0)
    subject, reference = Qwen2ForCausalLM(config()), Qwen2ForCausalLM(config())
    for parameter in subject.parameters():  # with Transformers' initial weights attention has little effect
        if parameter.ndim == 2:
            parameter.data.mul_(1.2 / (parameter.data.std() * parameter.shape[1] ** 0.5))
    reference.load_state_dict(subject.state_dict())
    reference.set_attn_implementation("eager")
    return subject.eval(), reference.eval()


def _ids(rows: int) -> torch.Tensor:
    return torch.randint(1, 61, (rows, sum(_LENGTHS)), generator=torch.Generator().manual_seed(rows))


def _positions() -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in _LENGTHS])[None]


def _alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the documents of one row, each run separately."""
    return torch.cat([model(part, use_cache=False).logits for part in torch.split(ids, _LENGTHS, 1)], 1)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    error = ((found - wanted).norm() / wanted.norm()).item()
    return float("inf") if math.isnan(error) else error


# ---- scenarios -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _packed(subject: Any, reference: Any) -> float:
    ids = _ids(1)
    return _error(subject(ids, position_ids=_positions()).logits, _alone(reference, ids))


@torch.no_grad()
def _padded(subject: Any, reference: Any) -> float:
    ids, mask = _ids(2), torch.ones(2, sum(_LENGTHS), dtype=torch.long)
    mask[1, :6] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    real = mask != 0
    return _error(subject(ids, **given).logits[real], reference(ids, **given).logits[real])


@torch.no_grad()
def _cached(subject: Any, reference: Any) -> float:
    """Several tokens at once with a filled cache."""
    ids, at = _ids(2), 9
    cache = next(caches_in(subject(ids[:, :at], use_cache=True)))
    found = subject(ids[:, at:], use_cache=True, **{cache_keyword(subject): cache}).logits
    return _error(found, reference(ids, use_cache=False).logits[:, at:])


@torch.no_grad()
def _decoding(subject: Any, reference: Any) -> float:
    """Tokens one by one with a cache, after left-padded rows."""
    ids, mask = _ids(2), torch.ones(2, sum(_LENGTHS), dtype=torch.long)
    mask[1, :4] = 0
    steps = []
    for each in (subject, reference):
        out = each(ids[:, :-3], attention_mask=mask[:, :-3], use_cache=True)
        for at in range(ids.shape[1] - 3, ids.shape[1]):
            over = {cache_keyword(each): next(caches_in(out))}
            out = each(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], use_cache=True, **over)
            steps.append(out.logits)
    return _error(torch.cat(steps[:3], 1), torch.cat(steps[3:], 1))


def _checkpointed(subject: Any, reference: Any) -> float:
    """The gradient of a packed row under gradient checkpointing."""
    ids = _ids(1)
    enable = getattr(
        subject, "activation_checkpointing_enable", subject.gradient_checkpointing_enable
    )  # Transformers 6
    enable({"use_reentrant": False})
    subject.train()  # checkpoints only in training
    packed = subject(ids, position_ids=_positions(), use_cache=False).logits
    return _error(_gradient(subject, packed), _gradient(reference, _alone(reference, ids)))


def _gradient(model: Any, logits: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(logits.square().sum(), [model.model.layers[0].self_attn.k_proj.weight])
    return found


@torch.no_grad()
def _guarded(subject: Any, reference: Any) -> float:
    """Whether calls that would mix documents through a cache are refused: 0 if they are, 1 if one runs."""
    ids = _ids(1)
    packed = next(caches_in(subject(ids, position_ids=_positions(), use_cache=True)))
    filled = next(caches_in(subject(ids[:, :3], use_cache=True)))
    for given, cache in (
        ({"input_ids": ids[:, :1]}, packed),
        ({"input_ids": ids, "position_ids": _positions()}, filled),
    ):
        with contextlib.suppress(AxattnError):
            subject(**given, **{cache_keyword(subject): cache})
            return 1.0
    return 0.0


SCENARIOS: dict[str, Callable[[Any, Any], float]] = {
    "packed": _packed,
    "padded": _padded,
    "cached": _cached,
    "decoding": _decoding,
    "packed and cached": _guarded,
    "checkpointed": _checkpointed,  # the last: it leaves the model in training
}
REFUSED: dict[str, contracts.Refused] = {
    "packed": "packed rows",
    "padded": "models",
    "cached": "models",
    "decoding": "models",
    "checkpointed": "packed rows",
    "packed and cached": "packed rows",
}
"""What is refused if a scenario is wrong."""


# ---- report and cached result ----------------------------------------------------------------------------------------


def _summary(outcomes: dict[str, str], kept: bool) -> str:
    wrong = [f"{name}: {text}" for name, text in outcomes.items() if text]
    right = [name for name, text in outcomes.items() if not text]
    notes = [f"right: {', '.join(right)}"] if right else []
    notes += [f"wrong, and refused: {', '.join(wrong)}"] if wrong else []
    when = " (from an earlier run)" if kept else ""
    return f"the canary, a two-layer Qwen 2 against eager{when}: {'; '.join(notes)}"


def _key() -> str:
    return ", ".join(f"{package} {contracts.version_of(package)}" for package in ("axattn", *_WATCHED))


def _file() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "axattn" / "canary.json"


def _read(path: Path) -> dict[str, dict[str, str]]:
    """The cached results, empty if there is no readable file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    fits = isinstance(found, dict) and all(isinstance(one, dict) for one in found.values())
    return found if fits else {}


def _write(path: Path, known: dict[str, dict[str, str]]) -> None:
    """Cache the results atomically: several processes of a job do this at once. An unwritable folder is ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.debug("axattn: the canary's result is not cached: %s", error)
