"""Whether the rows of a model can take another form: packed with several documents, unpadded into one row, split over
ranks, placed on ranks by document, or with prefixes that documents share. One table of all rules, each with the forms
that it rules out.

Checks that depend on a batch (a cache, its length) are in `axattn.documents.inputs`, checks that depend on backends in
the callers (`axattn.unpadding`, `axattn.parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from axattn.errors import Reason
from axattn.hf import contracts
from axattn.hf.source_inspection import code_of, signature_of
from axattn.hf.trial import shared_skeletons
from axattn.spec import names
from axattn.spec.capability import Need
from axattn.traits import losses, pooling
from axattn.traits.dynamic_rope import by_length
from axattn.traits.layer_needs import sub_configs
from axattn.traits.position_ids import counting_layers, unread_positions
from axattn.traits.token_mixers import mixers, scaled_by_share, text_model

Form = Literal["packed", "unpadded", "split", "placed", "shared"]


class Subject(NamedTuple):
    """The input of a rule.

    Attributes:
        model: a ``PreTrainedModel``.
        form: the form that its rows should take.
        needs: the needs of its layers.
        running: the name on each of its configs, None for Transformers' default.
    """

    model: torch.nn.Module
    form: Form
    needs: Sequence[Need]
    running: Sequence[str | None]


@shared_skeletons()
def reasons_against(
    model: torch.nn.Module, form: Form, needs: Sequence[Need] = (), running: Sequence[str | None] = ()
) -> list[Reason]:
    """Every reason why the rows of a model can't take a form; empty when they can. Arguments as for `Subject`."""
    subject = Subject(model, form, needs, running)
    return [reason for forms, rule in RULES if form in forms for reason in rule(subject)]


def inner_part(model: torch.nn.Module) -> torch.nn.Module:
    """What runs unpadded: the model, or its base model if a head or pooler reads one token of each padded row."""
    inner: torch.nn.Module = getattr(model, "base_model", model)
    one_token = pooling.reads_first(model) or pooling.reads_last(model)
    return inner if one_token or (pooling.pools(inner) and not pooling.reads_rows(model)) else model


# ---- the rules -------------------------------------------------------------------------------------------------------


def _token_mixers(subject: Subject) -> list[Reason]:
    return mixers(subject.model, by_document=subject.form != "split")


def _scaled_by_share(subject: Subject) -> list[Reason]:
    scaled = [name for name, _ in scaled_by_share(text_model(subject.model))]
    return (
        [Reason("model", f"{scaled[0]} scales a row by its share of masked tokens (token_dropout)")] if scaled else []
    )


def _counting_layers(subject: Subject) -> list[Reason]:
    return counting_layers(subject.model)


def _positions(subject: Subject) -> list[Reason]:
    cls = code_of(subject.model)
    if subject.form in ("split", "placed") and "position_ids" not in signature_of(subject.model).parameters:
        return [Reason("position_ids", f"{cls.__name__} takes no position_ids")]
    return unread_positions(subject.model)


def _outputs(subject: Subject) -> list[Reason]:
    """Outputs that are not one per token."""
    model = subject.model
    if subject.form == "packed":
        return pooling.classifies_rows(model)
    if subject.form in ("split", "placed"):
        return pooling.one_a_row(model)
    return [*pooling.contradictions(model), *pooling.one_a_row(inner_part(model), unless_first=True)]


def _loss(subject: Subject) -> list[Reason]:
    model = subject.model
    if subject.form == "unpadded":
        return losses.contradictions(model)
    if "labels" not in signature_of(model).parameters:
        return []
    name = code_of(model).__name__
    reasons = losses.contradictions(model)
    if reasons or losses.takes_keywords(model):
        return reasons
    return [Reason("model", f"{name} computes its loss itself, as a mean over the tokens it sees")]


def _native(subject: Subject) -> list[Reason]:
    native = sorted({name for name in subject.running if name is not None and names.is_native(name)})
    if not native and all(subject.running):
        return []
    shown = ", ".join(native) or "Transformers' default"
    text = f"{shown} is called by Transformers, which would leak the rows into each other"
    return [Reason("model", text, 'attn_implementation="auto" or "varlen"')]


def _encoder_decoder(subject: Subject) -> list[Reason]:
    if not getattr(subject.model.config, "is_encoder_decoder", False):
        return []
    return [Reason("model", "it is an encoder-decoder, whose two sides have other padding")]


def _composite(subject: Subject) -> list[Reason]:
    config: Any = subject.model.config
    return [Reason("model", "it takes images or audio by row")] if len(sub_configs(config)) > 1 else []


def _bias(subject: Subject) -> list[Reason]:
    biased = any(need.bias for need in subject.needs)
    return [Reason("bias", "its position bias is made for whole rows")] if biased else []


def _sparse(subject: Subject) -> list[Reason]:
    sparse = any(need.sparse for need in subject.needs)
    among = "one rank" if subject.form in ("split", "placed") else "one row, which would hold those of other documents"
    return [Reason("sparse", f"it selects keys among the tokens of {among}")] if sparse else []


def _bidirectional(subject: Subject) -> list[Reason]:
    if all(need.causal for need in subject.needs):
        return []
    return [Reason("causal", "its attention is not causal: a prompt's states depend on what comes after it")]


def _rope(subject: Subject) -> list[Reason]:
    stretching = by_length(subject.model.config)
    text = f"its rotary embedding ({', '.join(stretching)}) depends on the longest position on a rank"
    return [Reason("model", text)] if stretching else []


def _experts(subject: Subject) -> list[Reason]:
    if not getattr(subject.model.config, "output_router_logits", False):
        return []
    return [Reason("model", "output_router_logits: the balance of experts is taken over one rank's tokens")]


def _versions(subject: Subject) -> list[Reason]:
    return contracts.reasons("packed rows", *(("unpadded rows",) if subject.form in ("unpadded", "shared") else ()))


EVERY: tuple[Form, ...] = ("packed", "unpadded", "split", "placed", "shared")
RULES: tuple[tuple[tuple[Form, ...], Callable[[Subject], Iterable[Reason]]], ...] = (
    (EVERY, _token_mixers),
    (("placed",), _scaled_by_share),
    (("unpadded", "split", "placed", "shared"), _counting_layers),
    (EVERY, _positions),
    (("unpadded", "split", "placed"), _loss),
    (("unpadded", "split", "placed", "shared"), _native),
    (("unpadded", "split", "placed", "shared"), _encoder_decoder),  # packed: `axattn.documents.inputs.refusals`
    (("unpadded", "split", "placed", "shared"), _composite),
    (("unpadded", "split", "placed", "shared"), _bias),
    (("split", "placed", "shared"), _sparse),
    (("split", "placed"), _rope),
    (("split", "placed"), _experts),
    (("shared",), _bidirectional),
    (("packed", "unpadded", "split", "placed"), _outputs),  # shared: outputs of the backbone return to their places
    (EVERY, _versions),
)
"""The forms that each rule rules out. Counting layers (Llama 4's) are correct in packed rows that are short enough. The
rules for packed rows run on every ``PreTrainedModel`` inside a model, the others on the whole model."""
