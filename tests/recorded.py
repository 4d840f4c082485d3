"""What CUDA graphs do with a compiled graph, on a CPU: they record its parts between operators that torch cuts out.

Which operators those are torch says itself (`is_cudagraph_unsafe_fx_node`, which Inductor partitions by).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import utils as inductor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

READS = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""Methods of tensors that wait for a device when tensors live there."""


class Recording:
    """A compiler that passes copies of their inputs to graphs, and watches the parts of them that are recorded.

    Attributes:
        graphs: how many it compiled, a forward and its backward together.
        reads: values that a recorded part read on the host; a recording would fail there.
        cuts: operators between the recorded parts.
        nodes: how many operators in recorded parts ran.
        inside: whether one runs now.
    """

    def __init__(self) -> None:
        self.graphs, self.nodes, self.inside = 0, 0, False
        self.reads: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()

    def __deepcopy__(self, memo: Any) -> Recording:
        return self  # `CompileConfig` copies what it passes to torch.compile

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return aot_autograd(fw_compiler=self._half, bw_compiler=self._half)(graph, inputs)

    def _half(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        interpreter = _Parts(graph, self)

        def run(*given: Any) -> Any:
            with self._counted():
                return interpreter.run(*(x.clone() if isinstance(x, torch.Tensor) else x for x in given))

        return make_boxed_func(run)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count `READS`, in bodies of operators too, where no mode of torch is active."""
        with pytest.MonkeyPatch.context() as patch:
            for name in READS:
                patch.setattr(torch.Tensor, name, self._spy(name, getattr(torch.Tensor, name)))
            yield

    def _spy(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, *given: Any, **options: Any) -> Any:
            if self.inside:
                self.reads[name] += 1
            return method(x, *given, **options)

        return run


class _Parts(torch.fx.Interpreter):
    def __init__(self, graph: torch.fx.GraphModule, recording: Recording) -> None:
        super().__init__(graph)
        self.recording = recording

    def run_node(self, node: torch.fx.Node) -> Any:
        if node.op != "call_function":
            return super().run_node(node)
        if _is_cut_out(node):
            self.recording.cuts[str(node.target)] += 1
            return super().run_node(node)
        self.recording.nodes += 1
        self.recording.inside = True
        try:
            return super().run_node(node)
        finally:
            self.recording.inside = False


def _is_cut_out(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    if value is not None and free_unbacked_symbols(value):
        return True
    rule = getattr(inductor, "is_cudagraph_unsafe_fx_node", None)  # torch before 2.13 looks for the tag in place
    return torch.Tag.cudagraph_unsafe in getattr(node.target, "tags", ()) if rule is None else bool(rule(node))
