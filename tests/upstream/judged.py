"""What differs on `auto` from Transformers' attention in its own tests, and why that is right.

A refusal stands here only if its reason is true: the model, or the call, asks for what `auto` can't give.
"""

from __future__ import annotations

from tests.upstream.outcomes import Judgement

REFUSALS: tuple[Judgement, ...] = ()
BY_DESIGN: tuple[Judgement, ...] = (
    Judgement(
        "test_sdpa_can_dispatch_(non_)?composite_models$",
        "^AssertionError: False is not true ",
        'The test loads a model without a name and wants config._attn_implementation to be "sdpa"; here it is "auto".',
    ),
)
