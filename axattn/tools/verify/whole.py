"""`verify`: compares a model on a kernel with the same weights on eager, document by document."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from axattn import loading
from axattn.errors import AxattnError, InvalidInputError, Reason
from axattn.hf.checkpoints import concrete_class, load_config, resolve_class
from axattn.planning.planner import backend_of
from axattn.spec.capability import Exactness
from axattn.tools.verify.live import copied
from axattn.tools.verify.records import Check, Verification
from axattn.tools.verify.scenarios import DECODERS_ONLY, LONG, PROJECTIONS, SCENARIOS, Result, Subject
from axattn.traits.config_checks import require_possible

SLACK = 2.0
"""Multiple of eager's error in the model's dtype that a kernel may have, on top of `FLOOR`."""
FLOOR = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 2e-3}
LOSSY = 0.15
"""Extra error allowed for INT8 and FP8 kernels: 1-5 % per layer, more in the gradients of deep layers."""
EXACT: Exactness = "exact"
LONGEST = 8300
"""Longest row in tokens: eager's weights take heads x S x S."""
SHORTEST = 12
"""Shortest row in tokens: it holds three documents, and four tokens to decode."""


def verify(
    model: Any,
    attn_implementation: str = "auto",
    *,
    layers: int | None = None,
    length: int = 96,
    data: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Verification:
    """Run a model on a kernel through training and generation scenarios, and compare with eager in fp32.

    Scenarios: padding, packing (one row, many rows, cache on, all-ones mask), a changed document, rows longer than the
    window, decoding, and the gradients of the projections. The reference runs each document alone.

    Args:
        model: local folder or hub name (weights are loaded if they exist, else random), a config.json (random), or a
            model (a full copy is verified; the model is not changed).
        attn_implementation: a name.
        layers: number of first layers to keep; None for enough to cover every kind of layer, at most 8.
        length: tokens per row, `SHORTEST` or more; one scenario exceeds the window, with up to `LONGEST` tokens.
        data: a text file that supplies the tokens; None for random tokens.
        dtype: of the model under test; None for the checkpoint's.
        device: None for the GPU if there is one.
        progress: called with the name of each scenario before it runs.
        options: ``on_unsupported``, ``kernel_options``, ... as for `axattn.from_pretrained`.

    Raises:
        AxattnError: the kernel can't serve the model at all, this kind of model is not supported, or rows are too
            short.
    """
    if not isinstance(length, int) or isinstance(length, bool) or length < SHORTEST:
        text = f"length={length!r} is too short for rows of several documents, or not an integer"
        raise InvalidInputError(text, advice=f"Give {SHORTEST} or more.")
    live = copied(model) if isinstance(model, torch.nn.Module) else None
    config = load_config(_source(model), {})[0] if live is None else live.config
    if live is None:
        require_possible(config, concrete_class(resolve_class(None, config), config))
    text = config.get_text_config()
    if text is not config or getattr(config, "is_encoder_decoder", False):
        raise InvalidInputError(
            f"verify supports text models, and {config.model_type} needs other inputs",
            advice="Save its text model separately and verify that, or use axattn.VerifyCallback on the whole model.",
        )
    kept = _truncate(config, layers) if live is None else config.num_hidden_layers
    _without_dropout(config)
    window = max((size for size in [getattr(config, "sliding_window", None)] if size), default=0)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    candidate, weights = _load(model, config, dtype, where) if live is None else (live.to(where, dtype), "yours")
    kind = next(candidate.parameters()).dtype
    loading.plan(candidate, attn_implementation, **options)  # raises if the name can't serve this model at all
    reference = copy.deepcopy(candidate).float()
    for each in (candidate, reference):
        each.eval()
        each.set_attn_implementation("eager")
    decoder = bool(getattr(candidate, "can_generate", lambda: False)())
    draw = _token_source(config.name_or_path if live is not None else model, config, data, where)
    checks = []
    runnable = [name for name in SCENARIOS if (decoder or name not in DECODERS_ONLY) and (window or name != LONG)]
    served: Counter[str] = Counter()
    for name in runnable:
        if progress is not None:
            progress(name)
        size = max(length, window + 32) if name == LONG else length
        if size > LONGEST:
            checks.append(
                Check(name, "refused", detail=f"rows of {size:,} tokens are too long for the eager reference")
            )
            continue
        check, used = _one(name, candidate, reference, decoder, draw, size, attn_implementation, options)
        checks.append(check)
        served.update(used)
    return Verification(
        type(candidate).__name__,
        attn_implementation,
        dict(served),
        kept,
        weights,
        str(kind).removeprefix("torch."),
        str(where),
        tuple(checks),
    )


def _one(
    name: str,
    candidate: Any,
    reference: Any,
    decoder: bool,
    draw: Callable[[int, int], torch.Tensor],
    length: int,
    asked: str,
    options: dict[str, Any],
) -> tuple[Check, Counter[str]]:
    scenario, used = SCENARIOS[name], Counter[str]()
    train = "gradient" in name
    with torch.set_grad_enabled(train):
        for each in (candidate, reference):
            each.train(train)
        half = scenario(Subject(candidate, decoder), draw, length, True)
        exact = scenario(Subject(reference, decoder), draw, length, True)
        try:
            with loading.using(candidate, asked, **options) as model:
                if name == "no leak":  # compared with the same model, before the change
                    exact = scenario(Subject(model, decoder), draw, length, True)
                found = scenario(Subject(model, decoder), draw, length, False)
                for layer in loading.status(model).layers:
                    used.update(layer.served)
        except AxattnError as refusal:
            reasons = "; ".join(dict.fromkeys(r.text for r in refusal.reasons)) or str(refusal)
            return Check(name, "refused", detail=reasons), used
    lossy = any(backend_of(k).capability.exactness != EXACT for k in (used or [asked]) if k != "auto")
    return _judge(name, found, exact, half, next(candidate.parameters()).dtype, lossy), used


def _judge(name: str, found: Result, exact: Result, half: Result, dtype: torch.dtype, lossy: bool) -> Check:
    worst, budget, detail = 0.0, 0.0, ""
    for key, wanted in exact.items():
        got = found[key]
        if key.startswith("gradient") and wanted.numel() and wanted.norm() > 0:
            if got.numel() == 0:
                return Check(name, "wrong", math.inf, 0.0, f"{key}: there is none")
            if not torch.isfinite(got).all():
                return Check(name, "wrong", math.inf, 0.0, f"{key}: not finite")
            if got.norm() == 0:
                return Check(name, "wrong", 1.0, 0.0, f"{key}: zero")
        if not wanted.numel():
            continue
        allowed = FLOOR.get(dtype, 1e-4) + (LOSSY if lossy and name != "no leak" else 0.0)
        if name != "no leak":
            allowed += min(SLACK * relative(half[key], wanted), 0.5)  # limited, in case eager itself overflows
        error = relative(got, wanted)
        if worst == 0.0 or error / allowed > worst / budget:
            worst, budget, detail = error, allowed, key
    outcome = "ok" if worst <= budget else "wrong"
    return Check(name, outcome, worst, budget, detail if outcome == "wrong" else "")  # type: ignore[arg-type]  # one of Outcome


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference divided by the expected norm; infinite if shapes or finiteness differ."""
    if found.shape != wanted.shape:
        return math.inf
    value = ((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12)).item()
    return math.inf if math.isnan(value) else value


def _source(model: Any) -> Any:
    path = Path(str(model))
    return path.parent if path.name == "config.json" and path.is_file() else model


def _truncate(config: Any, layers: int | None) -> int:
    """Keep only the first layers of a config, in place; returns their number."""
    count = int(getattr(config, "num_hidden_layers", 0) or 0)
    kinds = list(getattr(config, "layer_types", None) or [])
    if layers is None:
        layers = max((kinds.index(kind) + 1 for kind in set(kinds)), default=2)
        layers = min(max(layers, 2), 8)
    if layers < 1:
        raise InvalidInputError(f"layers={layers} keeps nothing", advice="Give 1 or more.")
    kept = min(layers, count)
    config.num_hidden_layers = kept
    if kinds:
        config.layer_types = kinds[:kept]
    return kept


def _load(model: Any, config: Any, dtype: torch.dtype | None, device: torch.device) -> tuple[Any, str]:
    source = _source(model)
    cls = concrete_class(resolve_class(None, config), config)
    if cls is None:
        raise InvalidInputError(f"Transformers has no class for {config.model_type}")
    if source is model and _has_weights(source):  # a path to config.json means random weights
        try:
            found = cls.from_pretrained(  # type: ignore[attr-defined]  # a PreTrainedModel
                source, config=config, dtype=dtype or "auto", attn_implementation="eager"
            )
        except Exception as error:
            why = [Reason("weights", f"{type(error).__name__}: {str(error).splitlines()[0]}")]
            raise InvalidInputError(f"the weights in {source} can't be loaded", why) from error
        return found.to(device), "loaded"
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    built = cls(config)
    _sharpen(built)
    kind = dtype or getattr(config, "dtype", None) or torch.float32
    return built.to(device=device, dtype=kind), "random"


def _sharpen(model: torch.nn.Module) -> None:
    """Scale random projections to outputs of about unit size: with Transformers' initial weights attention has little
    effect, and a kernel that ignored a mask would pass."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and any(part in name for part in PROJECTIONS):
            parameter.data.mul_(1.2 / (parameter.std() * parameter.shape[1] ** 0.5))


def _has_weights(source: Any) -> bool:
    folder = Path(str(source))
    if not folder.is_dir():
        return not folder.exists()  # a hub name
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _token_source(model: Any, config: Any, data: Any, device: torch.device) -> Callable[[int, int], torch.Tensor]:
    """A function ``(rows, length) → ids`` that returns the same ids for the same size."""
    vocabulary = int(config.vocab_size)
    text: list[int] = []
    if data is not None:
        written = Path(data).read_text(encoding="utf-8", errors="replace")
        text = _encode(model, written, vocabulary)
        if not text:
            raise InvalidInputError(f"{Path(data).name} is empty")

    def draw(rows: int, length: int) -> torch.Tensor:
        if text:
            needed = rows * length
            return torch.tensor((text * (needed // len(text) + 1))[:needed], device=device).view(rows, length)
        generator = torch.Generator().manual_seed(rows * 10007 + length)
        low = min(8, vocabulary - 1)
        return torch.randint(low, vocabulary, (rows, length), generator=generator).to(device)

    return draw


def _encode(model: Any, text: str, vocabulary: int) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(model))
    except (OSError, ValueError, ImportError):  # the model has no tokenizer: use bytes
        return [byte % vocabulary for byte in text.encode()]
    found: list[int] = tokenizer(text[:200_000])["input_ids"]
    return found


_DROPOUTS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "embedding_dropout",
    "mlp_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout",
)


def _without_dropout(config: Any) -> None:
    """Set all dropout rates of a config to 0."""
    for key in _DROPOUTS:
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
