"""`ModelTraits`: what an input hook must know of its model, read once when the model is patched."""

from __future__ import annotations

from dataclasses import dataclass

from axattn.errors import Reason
from axattn.traits.picked_tokens import Pick


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """One ``PreTrainedModel`` as its input hook sees it.

    Attributes:
        parameters: names of the positional parameters of its ``forward``, in order.
        native: the native name that Transformers serves here, None for our own names.
        encoder_decoder: it is an encoder-decoder, whose rows can't be packed.
        mrope_planes: how many leading planes ``position_ids`` may have (Qwen-VL: 1, 3 or 4), () for none.
        shares_keys: some layers read the keys and values of another one.
        on_flash: its native name is a flash name.
        nondeterministic: why its kernel has no deterministic gradient, () where it has one.
        windowed: some layers have a sliding window.
        never_packs: on this native name no packed call is right (`axattn.documents.native_guard.never_packs_reasons`).
        mixers: layers that mix tokens outside of attention (`axattn.traits.token_mixers`): documents would leak through
            them.
        by_document: some of its layers run document by document (`axattn.traits.recurrent`,
            `axattn.traits.token_mixers.scaled_by_share`).
        max_row_length: the first position in a row at which some layer's result depends on it (Llama 4), None for none.
        rope_scaling_threshold: positions below this one have the original rotary frequencies
            (`axattn.traits.dynamic_rope`), None for all.
        packing_blockers: why packed rows can't be what is meant: positions that do not reach the model, one output a
            row, a version on which they are wrong.
        packing_blockers_in_graph: the same inside of a compiled graph.
        first_position: of a row's first token (`axattn.traits.position_ids.first_position`).
        counts_mask: without positions it counts them from the mask (`axattn.traits.position_ids.counts_mask`).
        first_must_be_real: why rows can't be padded on the left (sparse layers that count blocks), "" if they can.
        takes_lengths: its forward takes ``cu_seq_lens_*`` and ``max_length_*``, so the input hook can add them.
        image_blocks: it lays image blocks over its masks (`axattn.documents.native_flash_guard.image_blocks`).
        picks: which tokens its outputs are read from that it finds by ids (`axattn.traits.picked_tokens`).
        reads: where its outputs are read from, padding or not (`axattn.traits.pooling.read_at`).
    """

    parameters: tuple[str, ...] = ()
    native: str | None = None
    encoder_decoder: bool = False
    mrope_planes: tuple[int, ...] = ()
    shares_keys: bool = False
    on_flash: bool = False
    nondeterministic: tuple[Reason, ...] = ()
    windowed: bool = False
    never_packs: bool = False
    mixers: tuple[Reason, ...] = ()
    by_document: bool = False
    max_row_length: int | None = None
    rope_scaling_threshold: int | None = None
    packing_blockers: tuple[Reason, ...] = ()
    packing_blockers_in_graph: tuple[Reason, ...] = ()
    first_position: int = 0
    counts_mask: bool = False
    first_must_be_real: str = ""
    takes_lengths: bool = False
    image_blocks: bool = False
    reads: frozenset[str] = frozenset()
    picks: tuple[Pick, ...] = ()
