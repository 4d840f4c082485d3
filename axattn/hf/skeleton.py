"""A copy of a model without its layers and its weights: on a CPU it shows in a millisecond what the code of a head, of
embeddings or of a pooler does with inputs. What is asked of it is in `axattn.hf.probes`.

The model itself may be 70B, sharded, quantised or on ``meta``: of its weights only shapes are read, nothing of it runs
and nothing of it changes. Lists of layers are empty in the copy, so no layer runs.
"""

from __future__ import annotations

import copy
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch

from axattn.hf.source_inspection import code_of
from axattn.hf.weak_cache import weak_cache

_LARGEST = 1 << 20
"""Numbers in a parameter up to which it is made; of a larger one there is only the shape."""
_FEW = 256
"""Words of a vocabulary that are left of it where logits are made; embeddings have all."""
_WRAPPERS = ("original_module", "_orig_mod", "_checkpoint_wrapped_module", "base_layer")
"""Where wrappers keep what they are around: PEFT's and torch's."""
_OWN = frozenset({*vars(torch.nn.Module()), "forward", "_replicate_for_data_parallel"})
"""What a copy has of its own: parameters, children, hooks; and what patches put on an instance."""
_PLAIN = (bool, int, float, str, type(None), list, tuple, dict, set, torch.dtype)
"""Types of values whose text says all that there is to know."""


class Table(torch.nn.Embedding):
    """An embedding that needs no weights. It keeps the indices that it is asked for (`seen`), and what it gave for them
    (`given`, leaves of an autograd graph)."""

    def __init__(self, rows: int, width: int, padding: int | None) -> None:
        torch.nn.Module.__init__(self)
        self.become(rows, width, padding)

    def become(self, rows: int, width: int, padding: int | None) -> None:
        """As ``nn.Embedding.__init__``."""
        self.num_embeddings, self.embedding_dim, self.padding_idx = rows, width, padding
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.__dict__["weight"] = Shape.of((rows, width), self)
        self.seen: list[torch.Tensor] = []
        self.given: list[torch.Tensor] = []

    def rows_of(self, index: torch.Tensor) -> torch.Tensor:
        """int ``[...]`` → float32 ``[..., D]``, another vector for each index.

        Raises:
            IndexError: an index outside of the table, as of a real one.
        """
        if bool(((index < 0) | (index >= self.num_embeddings)).any()):
            raise IndexError("index out of range in self")
        self.seen.append(index.detach().clone())
        vector = torch.cos((index[..., None] + 1).float() * torch.arange(1, self.embedding_dim + 1))
        self.given.append(vector.requires_grad_())
        return vector * 1.0  # models change it in place, which autograd refuses of a leaf

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `rows_of`."""
        return self.rows_of(input)


class Projection(torch.nn.Module):
    """A linear layer of a low rank, whatever its size: each output depends on every input."""

    def __init__(self, inputs: int, outputs: int, biased: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.down, self.up = _values((4, inputs)), _values((4, outputs))  # of rank one a norm would leave nothing
        self.__dict__["weight"] = Shape.of((outputs, inputs))
        self.__dict__["bias"] = torch.zeros(outputs, dtype=torch.float32) if biased else None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """float ``[..., I]`` → float32 ``[..., O]``."""
        # no matmul: on a busy machine the threads of BLAS wait for each other longer than all the rest takes; and a
        # mean, so that no tanh behind it is flat
        inner = [(input.float() * row).mean(-1, keepdim=True) for row in self.down]
        return torch.stack([x * row for x, row in zip(inner, self.up, strict=True)]).sum(0)


class Watched:
    """Keeps the ``position_ids`` that a module is given (`seen`): a base of the copy of a rotary embedding."""

    seen: list[torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs and output as the original's."""
        forward: Any = super().forward  # type: ignore[misc]  # that of the class it is mixed into
        found = signature(forward.__func__).bind_partial(self, *args, **kwargs).arguments.get("position_ids")
        if isinstance(found, torch.Tensor):
            self.seen.append(found.detach().clone())
        buffers = cast(torch.nn.Module, self).buffers()
        if any(buffer.is_meta for buffer in buffers):  # no layer is there to be rotated
            return torch.ones(1, 1, 1), torch.ones(1, 1, 1)
        return forward(*args, **kwargs)


class Layers(torch.nn.ModuleList):
    """No layers: a loop over them ends at once; one asked for by its number hands on what it is given."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, slice) else _Layer()


class _Layer(torch.nn.Module):
    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden_states


class Shape(torch.Tensor):
    """A weight of which there is only the shape: what a model computes with it can't be shown.

    Of a table's the rows can be read.
    """

    table: Table | None

    @staticmethod
    def of(shape: tuple[int, ...], table: Table | None = None) -> torch.Tensor:
        """float32 of a shape, one number large."""
        new = torch.zeros((), dtype=torch.float32, device="cpu").expand(shape).as_subclass(Shape)
        new.table = table
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs what reads the shape, or rows of a table.

        Raises:
            TypeError: anything else.
        """
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "size", "dim", "numel", "is_floating_point"):
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name == "embedding" and isinstance(args[1], Shape) and args[1].table is not None:
            return args[1].table.rows_of(args[0])
        if name == "__getitem__" and isinstance(args[0], Shape) and args[0].table is not None:
            first, *rest = args[1] if isinstance(args[1], tuple) else (args[1],)
            found = args[0].table.rows_of(torch.arange(args[0].shape[0])[first])
            return found[(..., *rest)] if rest else found
        raise TypeError(f"{name} of a weight that has no values here")


class _Left:
    """In the place of an attribute that leads to a real module: a skeleton must not run that.

    Raises:
        TypeError: it is called (as anything without a ``__call__`` does).
    """


class Skeleton:
    """The copy of one model.

    Attributes:
        root: the copy of the model, in evaluation mode, float32 on the CPU.
        config: its config, a copy too; of a large vocabulary it names the first words alone.
        vocabulary: how many words the model has.
        key: what of the model makes a difference to what the copy does: classes, plain attributes, config values.

    Raises:
        RuntimeError: a buffer that can't be read.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules: dict[int, torch.nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self._noted: list[Any] = []  # hashable
        self._vocabularies: set[int] = set()
        self.root = self._module(model)
        self.config: Any = self.root.config
        config: Any = model.config
        self.vocabulary = int(getattr(config.get_text_config(), "vocab_size", None) or _FEW)
        self.key = tuple(self._noted)

    def tables(self) -> Iterator[Table]:
        """The embeddings of the copy, each once."""
        yield from (module for module in self.root.modules() if isinstance(module, Table))

    def readers(self) -> list[list[torch.Tensor]]:
        """What each embedding and each rotary embedding keeps of what it is asked for: lists that fill in a run."""
        return [module.seen for module in self.root.modules() if isinstance(module, Table | Watched)]

    def forget(self) -> None:
        """Empty what they keep."""
        for seen in self.readers():
            seen.clear()
        for table in self.tables():
            table.given.clear()

    def _config(self, config: Any) -> Any:
        """A config's copy, on eager attention, and so for the configs inside it."""
        if id(config) not in self._configs:
            new = self._configs[id(config)] = copy.copy(config)
            values = vars(new)
            values["_attn_implementation_internal"] = (
                "eager"  # an axattn backend would build masks for an open input hook
            )
            words = values.get("vocab_size")
            if isinstance(words, int) and words > _FEW:
                self._vocabularies.add(words)
                values["vocab_size"] = _FEW
                self._noted.append(words)
            for name, value in list(values.items()):
                if hasattr(value, "sub_configs"):
                    values[name] = self._config(value)
                elif not name.startswith("_"):
                    self._noted.append((name, _noted(value)))
            self._noted.append(type(config))
        return self._configs[id(config)]

    def _module(self, module: torch.nn.Module) -> torch.nn.Module:
        if id(module) not in self._modules:
            inner = next((found for name in _WRAPPERS if (found := module._modules.get(name)) is not None), None)
            self._modules[id(module)] = self._copied(module) if inner is None else self._module(inner)
        return self._modules[id(module)]

    def _copied(self, module: Any) -> torch.nn.Module:
        cls = code_of(module)
        cls = type(module) if cls is torch.nn.Module else cls  # containers have no forward
        self._noted.append(cls)
        if isinstance(module, torch.nn.ModuleList) and any(next(one.children(), None) is not None for one in module):
            return Layers()
        embeds = isinstance(module, torch.nn.Embedding)
        sizes = [(one, other) for one, other in _SIZES if hasattr(module, one) and hasattr(module, other)]
        if sizes and not embeds:
            inputs, outputs = (getattr(module, name) for name in sizes[0])
            self._noted.append((inputs, outputs))
            return Projection(inputs, self._cut(outputs), getattr(module, "bias", None) is not None)
        if embeds:
            cls = type(cls.__name__, (cls, Table), {}) if cls is not torch.nn.Embedding else Table
        elif "position_ids" in signature(cls.forward).parameters and next(module.parameters(), None) is None:
            cls = type(cls.__name__, (Watched, cls), {"seen": []})
        new: torch.nn.Module = object.__new__(cls)
        torch.nn.Module.__init__(new)
        self._modules[id(module)] = new
        for name, value in vars(module).items():
            if name not in _OWN:
                new.__dict__[name] = self._attribute(name, value)
        if isinstance(new, Table):
            new.become(module.num_embeddings, module.embedding_dim, module.padding_idx)
        # what models ask their first parameter for: its dtype, its device
        new._parameters["_"] = torch.nn.Parameter(torch.zeros((), dtype=torch.float32), requires_grad=False)
        for name, value in module._parameters.items():
            if name not in vars(new):
                new.__dict__[name] = None if value is None else _parameter(tuple(map(self._cut, value.shape)))
                self._noted.append((name, None if value is None else tuple(value.shape)))
        for name, value in module._buffers.items():
            new._buffers[name] = None if value is None else self._buffer(value)
            self._noted.append((name, None if value is None else (tuple(value.shape), value.is_meta)))
        for name, child in module._modules.items():
            self._noted.append(name)
            new._modules[name] = None if child is None else self._module(child)
        new.training = False
        return new

    def _attribute(self, name: str, value: Any) -> Any:
        if hasattr(value, "sub_configs"):
            return self._config(value)
        if _holds_modules(value):
            return _Left()
        # a loss that a user has set is told from another one, and not kept alive
        self._noted.append((name, weakref.ref(value) if name == "_loss_function" else _noted(value)))
        return self._cut(value) if name == "vocab_size" else value

    def _buffer(self, value: torch.Tensor) -> torch.Tensor:
        new = torch.empty_like(value) if value.is_meta else value.detach().to("cpu", copy=True)
        return new[..., : self._cut(new.shape[-1])] if new.ndim else new

    def _cut(self, size: int) -> int:
        """A size, where it is not that of a vocabulary."""
        return _FEW if size in self._vocabularies else size


_SIZES = (("in_features", "out_features"), ("nx", "nf"))
"""What linear layers call their sizes; the second is GPT-2's."""


@weak_cache
def signature(forward: Any) -> inspect.Signature:
    """That of a ``forward`` under its decorators, ``self`` included."""
    return inspect.signature(inspect.unwrap(forward))


def _values(shape: tuple[int, ...]) -> torch.Tensor:
    """Some values, the same each time, no two rows alike: a view of as many numbers as the sides are long."""
    line = torch.sin(torch.arange(1, sum(shape) + 2, dtype=torch.float32, device="cpu") ** 2)
    return line.as_strided(shape, [1] * len(shape))


def _parameter(shape: tuple[int, ...]) -> torch.Tensor:
    return _values(shape) if torch.Size(shape).numel() <= _LARGEST else Shape.of(shape)


def _noted(value: Any) -> Any:
    """What a value is told apart by, hashable."""
    if isinstance(value, _PLAIN):
        return repr(value)
    return weakref.ref(value) if isinstance(value, types.FunctionType) else type(value)


def _holds_modules(value: Any) -> bool:
    """Whether an attribute leads to a real module past the copy: one in a list, one behind a bound method."""
    if isinstance(value, torch.nn.Module | types.MethodType):
        return True
    several = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return any(map(_holds_modules, several))
