"""The kernels that a layer does not get: why, and what each would cost."""

from __future__ import annotations

import axattn
from axattn.planning.alternatives import alternatives
from axattn.planning.estimates import computed_flops, estimate
from axattn.planning.plan import LayerPlan
from tests.environments import CPU, HOPPER
from tests.models import build


def test_every_kernel_of_the_order_that_runs_here_is_named_once() -> None:
    plan = axattn.plan(build("llama").config, environment=CPU)
    entry = plan.layers[0]
    found = alternatives(entry, CPU, 1000)
    assert [(one.backend, one.serves) for one in found] == [("sdpa", True), ("eager", True)]
    for one in found:
        other = LayerPlan(entry.layer, entry.asked, one.backend)
        assert one.extra_bytes == estimate(other, 1000).extra_bytes
        assert one.flops == computed_flops(other, 1000)
        assert one.reasons
    assert found[1].flops > found[0].flops


def test_what_lacks_a_feature_comes_first_with_its_reason() -> None:
    plan = axattn.plan(build("gemma2").config, environment=CPU)
    found = alternatives(plan.layers[0], CPU, 1000)
    assert [(one.backend, one.serves) for one in found] == [("varlen", False), ("sdpa", False)]
    assert all("softcap" in reason for one in found for reason in one.reasons)


def test_a_name_that_was_asked_for_has_no_alternatives_but_those_refused() -> None:
    plan = axattn.plan(build("llama").config, "flash_attention_3", environment=HOPPER)
    assert alternatives(plan.layers[0], HOPPER, 1000) == []
