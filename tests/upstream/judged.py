"""What differs on `auto` from Transformers' attention in its own tests, and why that is right.

A refusal stands here only if its reason is true: the model, or the call, asks for what `auto` can't give.
"""

from __future__ import annotations

from tests.upstream.outcomes import Judgement

REFUSALS: tuple[Judgement, ...] = (
    Judgement(
        "test_eager_matches_sdpa_inference_.*pad_right",
        r"reads the last token of each row that is not config.pad_token_id .*, and that is padding",
        "The test masks the end of rows of random ids, none of them the padding id, and makes the window two tokens "
        "long: the head reads a masked token whose window holds masked tokens alone.",
    ),
    Judgement(
        "^modernbert_test::test_eager_matches_sdpa_inference_.*pad_left",
        r"ModernBertForSequenceClassification reads the first token of each row, which is padding",
        "The test masks the start of the rows of a head that reads their first token.",
    ),
    Judgement(
        "^bert_test::test_ways_(greedy|sampled|from_embeddings)$",
        r"the layer has 1 queries and 8 keys, its mask is made for 1 and 1",
        "A BERT whose config says is_decoder=False generates with a cache: Transformers makes the mask of a step for "
        "the new token alone, and what comes differs from a run without the cache on any kernel.",
    ),
)
BY_DESIGN: tuple[Judgement, ...] = (
    Judgement(
        "test_sdpa_can_dispatch_(non_)?composite_models$",
        "^AssertionError: False is not true ",
        'The test loads a model without a name and wants config._attn_implementation to be "sdpa"; here it is "auto".',
    ),
)
