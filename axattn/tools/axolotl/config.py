"""`AttentionConfig`: the attention settings of a training config, with all their checks (pydantic v2).

Legacy booleans are input only; the three capability flags are output only.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    computed_field,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue

from axattn import backends
from axattn.errors import AxattnError, InvalidConfigError, Reason
from axattn.machine.environment import Environment
from axattn.machine.presets import as_environment
from axattn.planning.plan import Plan
from axattn.planning.planner import require_available
from axattn.planning.routes import OnUnsupported  # pydantic reads it at run time
from axattn.spec import names
from axattn.tools.axolotl import config_file, setting_names

if TYPE_CHECKING:
    from axattn.documents.collator import PackingCollator

COMPUTED = setting_names.COMPUTED


def _legacy_schema(schema: JsonSchemaValue) -> None:
    """Add the legacy booleans to the JSON schema as deprecated input."""
    for flag, name in names.LEGACY_FLAGS.items():
        schema["properties"][flag] = {
            "anyOf": [{"type": "boolean"}, {"type": "null"}],
            "default": None,
            "deprecated": True,
            "title": flag.replace("_", " ").title(),
            "description": f'Deprecated: write attn_implementation: "{name}".',
        }


class _AxattnErrors(type(BaseModel)):  # type: ignore[misc]  # pydantic's metaclass has no public name
    """Makes ``AttentionConfig(...)`` raise axattn's errors; pydantic's methods still raise pydantic's."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise _invalid(f"{cls.__name__} can't be created", error) from error


class AttentionConfig(BaseModel, metaclass=_AxattnErrors):
    """The attention settings of a training config.

    All problems are reported at once, each with what to type instead: as an `axattn.InvalidConfigError` when the config
    is created, read from a file or assigned to, as a ``pydantic.ValidationError`` by pydantic's methods. Machine
    requirements are checked only against an `Environment` passed as context, or its name (``"sm90"``):
    ``AttentionConfig.model_validate(data, context={"environment": Environment.current()})``.

    Attributes:
        attn_implementation: canonical name, hub path, dict per sub-config, or None (which means ``"auto"``).
        sample_packing: rows hold several documents.
        adapter: PEFT adapter (``"lora"``, ``"qlora"``), None for a full fine-tune.
        model_type: Transformers' model type or class name, if known.
        use_cache: the model's cache setting; ``fp8`` sets it to False.
        context_parallel_size: ranks that share one sequence.
        activation_offloading: offload activations to the CPU in training.
        scaling_softmax: Llama 4's scaled softmax, which only flex attention supports.
        gemma4_hybrid_attn_impl: FlashAttention 2 on Gemma 4's sliding layers, another kernel on its global ones.
        on_unsupported: as for `axattn.from_pretrained`; ``route`` generalises ``gemma4_hybrid_attn_impl``.
        upgrade_flash: as for `axattn.from_pretrained`: ``flash_attention_2`` may run as ``flash_attention_4``.
    """

    model_config = ConfigDict(extra="forbid", json_schema_extra=_legacy_schema, protected_namespaces=())

    attn_implementation: str | dict[str, Any] | None = None
    sample_packing: bool = False
    adapter: str | None = None
    model_type: str | None = None
    use_cache: bool | None = None
    context_parallel_size: int = 1
    activation_offloading: bool | str | None = None
    scaling_softmax: bool | None = None
    gemma4_hybrid_attn_impl: bool | None = None
    on_unsupported: OnUnsupported = "raise"
    upgrade_flash: bool = True

    _resolved: tuple[str, ...] | None = PrivateAttr(default=None)
    _resolved_packs: bool | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any, info: ValidationInfo) -> Any:
        """The only validator: maps legacy flags, checks names and their consequences, reports all problems at once."""
        if not isinstance(data, Mapping):
            return data
        values = dict(data)
        problems: list[str] = []
        for name in COMPUTED:
            if name in values:
                del values[name]
                problems.append(f"{name} is computed from attn_implementation and can't be set; remove it.")
        _take_legacy(values, problems)
        requested = values.get("attn_implementation")
        if requested is not None:
            try:
                requested = values["attn_implementation"] = names.canonicalise_all(requested)
            except AxattnError as error:
                problems.append(str(error))
                requested = None
        listed = [] if requested is None else names.names_in(requested)
        problems += _conflicts(values, listed)
        environment = as_environment((info.context or {}).get("environment"))
        for name in listed:
            if environment is not None:
                problems += _machine_problems(name, environment)
        if problems:
            raise ValueError("\n".join(problems) if len(problems) == 1 else "\n".join(f"- {p}" for p in problems))
        _apply_consequences(values, listed)
        return values

    @computed_field  # type: ignore[prop-decorator]  # pydantic documents this order of decorators
    @property
    def attn_supports_packing(self) -> bool:
        """Whether every name keeps packed documents apart whatever else is set, as in axolotl's table.

        False for ``eager`` and ``sdpa``: there Transformers keeps documents apart only without a cache and without an
        ``attention_mask`` (`axattn.backends.packs`); axattn refuses other packed rows.
        """
        if self._resolved_packs is not None:
            return self._resolved_packs
        return all(backends.supports_packing(name) for name in self.names)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def attn_uses_flash_lib(self) -> bool:
        """Whether any named kernel comes from a flash attention library."""
        return any(names.flags(name).flash_lib for name in self._resolved or self.names)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def attn_needs_dtype_cast(self) -> bool:
        """Whether stray fp32 embeddings and norms must be cast to the dtype of the other weights."""
        return any(names.flags(name).dtype_cast for name in self._resolved or self.names)

    @property
    def sample_packing_drop_attention_mask(self) -> bool:
        """Whether a packing loader omits the attention mask: if every kernel keeps documents apart, position ids and
        lengths describe them, and a mask would only hide them."""
        return self.sample_packing and self.attn_supports_packing

    def __setattr__(self, name: str, value: Any) -> None:
        """Set and check a setting together with all others; after an error the config is unchanged."""
        if name not in type(self).model_fields:
            super().__setattr__(name, value)
            return
        try:
            checked = type(self).model_validate({**self.__dict__, name: value})
        except ValidationError as error:
            raise _invalid(f"{name} can't be {value!r}", error) from error
        self.__dict__.update(checked.__dict__)
        self.__pydantic_fields_set__.add(name)
        self._resolved = self._resolved_packs = None

    def collator(self, max_length: int, **options: Any) -> PackingCollator | None:
        """A `PackingCollator` if this config packs, None if each document has its own row.

        Args:
            max_length: tokens per row.
            options: for `PackingCollator`.
        """
        from axattn.documents.collator import PackingCollator

        return PackingCollator(max_length, **options) if self.sample_packing_drop_attention_mask else None

    @property
    def names(self) -> list[str]:
        """The requested names; ``["auto"]`` if there are none."""
        return ["auto"] if self.attn_implementation is None else names.names_in(self.attn_implementation)

    def resolve(self, plan: Plan) -> Self:
        """A copy whose flags describe the kernels that `plan` chose (for ``auto``, those it selected)."""
        resolved = self.model_copy()
        chosen = tuple(dict.fromkeys(entry.chosen for entry in plan.layers))
        resolved._resolved = chosen or None
        if chosen:  # Transformers masks for native names, axattn for every kernel of its backends
            running = [(plan.running.get(entry.layer.path), entry.chosen) for entry in plan.layers]
            resolved._resolved_packs = all(
                backends.supports_packing(name or "sdpa")
                if name is None or names.is_native(name)
                else backends.get(kernel).capability.segments
                for name, kernel in running
            )
        return resolved

    @classmethod
    def from_yaml(cls, path: str | Path, environment: Environment | str | None = None) -> Self:
        """Read the attention settings of an axolotl YAML file (safe loader); other settings are ignored.

        The keys of axattn's plugin are read as what they set in axolotl: ``axattn:`` as ``attn_implementation:``,
        ``axattn_on_unsupported:`` as ``on_unsupported:``.

        Args:
            path: the file.
            environment: the machine, or its name, to check the names against.

        Raises:
            InvalidConfigError: no file, not a mapping, unreadable YAML, a duplicate or misspelt key, or contradicting
                settings.
        """
        if not isinstance(path, str | Path):
            raise InvalidConfigError(f"a config is read from a path, not from a {type(path).__name__}")
        known = {*cls.model_fields, *names.LEGACY_FLAGS, *COMPUTED}
        values = config_file.settings(Path(path), known)
        taken = {key: value for key, value in values.items() if key in known} | _of_plugin(Path(path), values)
        if "model_type" not in taken or taken["model_type"] is None:
            taken["model_type"] = values.get("type_of_model") or values.get("model_config_type")
            if values.get("is_llama_derived_model"):
                taken["model_type"] = "llama"
        if taken.get("context_parallel_size") is None:  # axolotl's older name
            taken["context_parallel_size"] = values.get("sequence_parallel_degree")
        for key in ("sample_packing", "context_parallel_size", "on_unsupported", "upgrade_flash"):
            if key in taken and taken[key] is None:
                del taken[key]
        try:
            return cls.model_validate(taken, context={"environment": environment})
        except ValidationError as error:
            raise _invalid(f"{Path(path).name} can't be used", error) from error


def _of_plugin(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the keys of axattn's axolotl plugin stand for.

    Raises:
        InvalidConfigError: the setting itself is in the file, too, with another value.
    """
    found = {}
    for key, field in setting_names.PLUGIN_KEYS.items():
        given, other = values.get(key), values.get(field)
        if given is None:
            continue
        if other not in (None, given) and (field, other) != ("attn_implementation", "eager"):  # as the plugin takes it
            text = f"{key}: {given} and {field}: {other} contradict each other"
            raise InvalidConfigError(f"{path.name} can't be used", [Reason(key, text)], f"Leave {field} out.")
        found[field] = given
    if values.get("axattn_kernel_options"):
        _warn("axattn_kernel_options: give them to axattn.from_pretrained(kernel_options=...)", UserWarning)
    return found


def _warn(text: str, category: type[Warning]) -> None:
    """Warn at the line of the caller outside of axattn and pydantic."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in ("axattn", "pydantic"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def _invalid(text: str, error: ValidationError) -> InvalidConfigError:
    reasons = [Reason(".".join(map(str, one["loc"])) or "config", _without_prefix(one)) for one in error.errors()]
    return InvalidConfigError(text, reasons)


def _without_prefix(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def _take_legacy(values: dict[str, Any], problems: list[str]) -> None:
    """Replace the legacy booleans in `values` by ``attn_implementation``, with a warning for each."""
    true: list[str] = []
    for flag, name in names.LEGACY_FLAGS.items():
        if flag not in values:
            continue
        given = values.pop(flag)
        if given is None or given is False:
            continue
        if given is not True:
            problems.append(f"{flag} is {given!r}, not true or false; write attn_implementation: {name}.")
            continue
        true.append(flag)
        text = f"{flag} is deprecated; write attn_implementation: {name}"
        _warn(text, DeprecationWarning)
    if not true:
        return
    if values.get("attn_implementation") is not None:
        flags = ", ".join(true)
        problems.append(
            f"{flags} and attn_implementation: {values['attn_implementation']} are both given; "
            f"keep attn_implementation and remove {flags}."
        )
    else:
        values["attn_implementation"] = names.LEGACY_FLAGS[true[0]]  # LEGACY_FLAGS is in order of priority


def _conflicts(values: Mapping[str, Any], listed: list[str]) -> list[str]:
    """Contradictions within the config, each with what to type instead."""
    problems: list[str] = []
    packing = bool(values.get("sample_packing"))
    for name in listed:
        if packing and not backends.supports_packing(name):
            why = "it can't pack"
            if "/" in name:
                why = "it is a hub kernel, and axattn does not know whether it separates documents"
            elif backends.packs(name) != "no":
                why = f"it can't pack, except {backends.packs(name)} ({names.WITHOUT_A_CACHE})"
            problems.append(f"sample_packing with {name}: {why}; write attn_implementation: varlen.")
        if name == "s2":
            model = values.get("model_type")
            if model is not None and not _is_llama(str(model)):
                problems.append(f"s2 is defined for LLaMA models only, not {model}; write attn_implementation: varlen.")
    parallel = values.get("context_parallel_size", 1)
    if isinstance(parallel, str) and parallel.strip().isdigit():
        parallel = int(parallel)  # pydantic reads it so
    if isinstance(parallel, int) and parallel < 1:
        problems.append(f"context_parallel_size is {parallel}, not a number of ranks; write 1 to turn it off.")
    if isinstance(parallel, int) and parallel > 1 and not (listed and all(names.flags(n).flash_lib for n in listed)):
        problems.append(
            f"context_parallel_size: {parallel} needs a flash attention library; "
            "write attn_implementation: flash_attention_2."
        )
    if values.get("activation_offloading") and "flex_attention" in listed:
        problems.append(
            "activation_offloading does not work with flex_attention; write attn_implementation: varlen, "
            "or remove activation_offloading."
        )
    if values.get("scaling_softmax") and listed != ["flex_attention"]:
        problems.append("scaling_softmax needs flex_attention; write attn_implementation: flex_attention.")
    if values.get("gemma4_hybrid_attn_impl") and listed != ["flash_attention_2"]:
        shown = ", ".join(listed) or "no name"
        problems.append(
            f"gemma4_hybrid_attn_impl works with flash_attention_2 only, and {shown} is given; "
            "write attn_implementation: flash_attention_2."
        )
    return problems


def _machine_problems(name: str, environment: Environment) -> list[str]:
    try:
        require_available(name, environment)
    except AxattnError as error:
        return [str(error)]
    return []


def _apply_consequences(values: dict[str, Any], listed: list[str]) -> None:
    """Warnings, and settings that a kernel implies."""
    if "s2" in listed:
        text = "s2 (shifted sparse attention) is deprecated; write attn_implementation: varlen"
        _warn(text, DeprecationWarning)
    if "fp8" in listed and values.get("use_cache") is not False:
        values["use_cache"] = False
        _warn("fp8 sets use_cache: false", UserWarning)


def _is_llama(model: str) -> bool:
    return "llama" in model.lower() and "llama4" not in model.lower()
