"""`Route`: which kernels may serve one attention layer, in order, and which have. No attention runs here."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from axattn import backends
from axattn.backends.base import Backend
from axattn.errors import Reason, UnsupportedAttentionError
from axattn.hf.torch_internals import in_traced_subgraph, is_tracing
from axattn.machine.environment import Environment
from axattn.planning.ranking import by_need, interned, usable
from axattn.spec.capability import Capability, Need, missing
from axattn.spec.notices import warn_once

OnUnsupported = Literal["raise", "route"]
ATTRIBUTE = "_axattn_route"


@dataclass(eq=False)
class Route:
    """The kernels that one attention module may use.

    Attributes:
        asked: the name that was asked for.
        layer: the module's qualified name in the model, or its class name.
        candidates: backends in the order in which they are tried.
        planned: the backend that the plan chose at load.
        served: calls served, by the backend whose kernel ran (`AttentionCall.ran`).
        compiled: the backend inside a compiled graph, whose calls are not counted; if an operator passes a call on when
            it runs (non-contiguous padding), it is not noted here.
        decisions: backend by kind of call, so that a call like an earlier one costs one dict lookup.
        kernels: the backends of `candidates` and their capabilities here; torch.compile can't trace the lookup.
        short: the name of the backend by a smaller key, for calls of whole rows (`axattn.attention.short_path`).
        options: the user's ``kernel_options``.
        options_json: the same as text, for operators of compiled graphs.
        options_json_deterministic: the same for a call with ``deterministic=True``.
    """

    asked: str
    layer: str
    candidates: tuple[str, ...]
    planned: str
    served: dict[str, int] = field(default_factory=dict)
    compiled: str | None = None
    decisions: dict[Any, Backend] = field(default_factory=dict)
    short: dict[Any, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    kernels: dict[str, tuple[Backend, Capability]] = field(init=False, repr=False)
    options_json: str = field(init=False, repr=False)
    options_json_deterministic: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.options_json = json.dumps(dict(self.options))  # torch.compile can't trace it
        self.options_json_deterministic = json.dumps({**self.options, "deterministic": True})
        machine, found = Environment.current(), [backends.get(name) for name in self.candidates]
        self.kernels = {backend.name: (backend, backend.called_capability_on(machine)) for backend in found}

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "decisions": {}, "short": {}}
        del state["kernels"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def count(self, name: str) -> None:
        """Count a call that the kernel of a backend has served."""
        if not is_tracing():
            self.served[name] = self.served.get(name, 0) + 1
        elif torch.compiler.is_compiling() and in_traced_subgraph():
            self._note_compiled(name)
        else:
            self.compiled = name  # replayed at each call, also if layers share one graph

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.13
    def _note_compiled(self, name: str) -> None:
        """Note it only while the graph is traced: Dynamo calls this itself."""
        self.compiled = name

    def choose(self, need: Need) -> Backend:
        """The first candidate that serves `need`.

        Raises:
            UnsupportedAttentionError: none does; with every candidate's reasons.
        """
        reasons: list[Reason] = []
        shown: Callable[[object], str] = str
        if is_tracing():
            shown = _hidden
            if len(self.kernels) > 1:
                need = replace(need, traced=True)  # with a choice, only kernels that trace
        for name in by_need(self.candidates, need) if self.asked == "auto" else self.candidates:
            backend, capability = self.kernels[name]
            lacking = missing(need, capability, name, shown=shown)
            if not lacking:
                if name != self.planned and reasons:
                    self._warn_routed(name, reasons)
                return backend
            reasons += lacking
        advice = 'Use attn_implementation="auto", or on_unsupported="route".'
        if len(self.candidates) > 1:
            advice = 'Use attn_implementation="eager".'
        fixes = list(dict.fromkeys(reason.fix for reason in reasons if reason.fix))
        if fixes:
            advice = f"To fix it: {'; '.join(fixes)}. {advice}"
        asked = self.candidates[0] if len(self.candidates) == 1 else self.asked
        raise UnsupportedAttentionError(f"{asked} can't serve {self.layer}", reasons, advice)

    def _warn_routed(self, name: str, reasons: list[Reason]) -> None:
        text = "; ".join(reason.text for reason in reasons)
        if not is_tracing():
            key = (self.asked, name, text)
            warn_once(f"{self.layer} runs on {name} instead of {self.planned}: {text}", key)


def _hidden(_: object) -> str:
    return "?"


_unplanned: weakref.WeakKeyDictionary[torch.nn.Module, Route] = weakref.WeakKeyDictionary()


def candidates(
    name: str, on_unsupported: OnUnsupported, environment: Environment, options: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Backends to try for an axattn backend on a machine, in order. Equal results are the same object."""
    if name == "auto":
        return usable(environment)
    serving = providers(backends.get(name), options or {})
    first = tuple(one for one in serving if not backends.get(one).probe(environment)) or (name,)
    if on_unsupported == "raise":
        return interned(first)
    return interned((*first, *(other for other in usable(environment) if other not in first)))


def providers(backend: Backend, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The backends that may serve a backend's name: itself, or those of an option that selects a backend."""
    for option in backend.options:
        if option.backends:
            chosen = options.get(option.name, option.default)
            return tuple(option.backends.values()) if chosen not in option.backends else (option.backends[chosen],)
    return (backend.name,)


def unplanned_route(module: torch.nn.Module) -> Route | None:
    """The route that `route_of` has made for a module of a model without a plan; None before its first call."""
    return _unplanned.get(module)


def route_of(module: torch.nn.Module, name: str) -> Route:
    """The route of an attention module: from its model's plan, or a new one if axattn did not load the model."""
    route: Route | None = module.__dict__.get(ATTRIBUTE)
    if route is not None and route.asked == name:
        return route
    route = _unplanned.get(module)
    if route is None or route.asked != name:
        order = candidates(name, "raise", Environment.current())
        route = Route(name, type(module).__name__, order, order[0])
        _unplanned[module] = route
    return route
