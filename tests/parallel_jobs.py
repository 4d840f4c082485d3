"""What the processes of `tests/parallel/test_sequence_parallel.py` and `tests/e2e/test_distributed.py` run. No test
lives here."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
import torch.distributed as dist
import transformers as tf
from torch.distributed.device_mesh import init_device_mesh

import axattn
from tests.fakes.machine import hopper
from tests.models import CONFIGS, build, positions, tokens

_PACKED = ("packed", "packed uneven", "document ids in the mask")
SCENARIOS = ("dense", *_PACKED, "right padded", "left padded", "uneven", "many rows", "checkpointed", "tiny")


def batch(scenario: str) -> dict[str, Any]:
    """A batch of `scenario` with labels, the same on every rank."""
    if scenario in ("packed", "checkpointed"):
        ids, where = tokens(1, 24), positions((5, 11, 8))
    elif scenario in ("packed uneven", "document ids in the mask"):
        ids, where = tokens(2, 21), positions((5, 9, 7), (20, 1))
    elif scenario == "uneven":
        ids, where = tokens(1, 21), None
    elif scenario == "tiny":  # with three ranks, one has no token
        ids, where = tokens(2, 2), None
    elif scenario == "many rows":
        ids, where = tokens(3, 16), None
    else:
        ids, where = tokens(2, 24), None
    given = {"input_ids": ids, "labels": ids.clone()}
    if where is not None:
        given["position_ids"] = where
        given["labels"][where == 0] = -100
    if scenario == "document ids in the mask":
        given["attention_mask"] = (given.pop("position_ids") == 0).cumsum(-1)
    if "padded" in scenario:
        mask = torch.ones_like(ids)
        if scenario == "right padded":
            mask[0, 17:] = 0
        else:
            mask[1, :6] = 0
        given["attention_mask"] = mask
        given["labels"] = given["labels"].masked_fill(mask == 0, -100)
    return given


def worst(pairs: Any) -> float:
    """The largest error of pairs of tensors, relative to the largest value of the second."""
    return max(float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-3)) for a, b in pairs)


def errors(cases: list[tuple[str, str, str, str]], strategy: str = "ulysses") -> dict[str, Any]:
    """The largest error of loss, logits and gradients against the same model whole; the text of a refusal.

    Args:
        cases: (family, name, kernel that must serve, scenario); a kernel in brackets runs as a strict fake on an H200.
        strategy: of `axattn.sequence_parallel`; ``"both"`` for a mesh of two dimensions.
    """
    found: dict[str, Any] = {}
    for family, name, kernel, scenario in cases:
        inside = hopper(kernel[1:-1]) if kernel.startswith("[") else contextlib.nullcontext()
        with inside:
            found[f"{family} {name} {kernel} {scenario}"] = _error(family, name, kernel.strip("[]"), scenario, strategy)
    return found


def _error(family: str, name: str, kernel: str, scenario: str, strategy: str) -> float | str:
    heads = {"num_attention_heads": 8, "head_dim": 8} if family == "llama" and name != "s2" else {}
    whole, split = build(family, **heads), build(family, **heads)
    whole.set_attn_implementation("eager")
    inputs = batch(scenario)
    try:
        axattn.apply(split, name)
        if strategy == "both":
            axattn.sequence_parallel(split, grid(), gather=True)
        else:
            axattn.sequence_parallel(split, dist.group.WORLD, strategy=strategy, gather=True)
        if scenario == "checkpointed":
            split.gradient_checkpointing_enable({"use_reentrant": False})
            split.train()
        got = split(**inputs)
    except axattn.AxattnError as error:
        return str(error)
    axattn.apply(whole, "auto" if family != "llama" else "varlen")
    expected = whole(**inputs, use_cache=False)
    expected.loss.backward()
    got.loss.backward()
    axattn.parallel.average_gradients(split, dist.group.WORLD)
    served = {k for layer in axattn.status(split).layers for k in layer.served}
    assert kernel in ("", *served), f"{family} {name}: served by {served}"
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    pairs = [(got.loss, expected.loss), (got.logits[real], expected.logits[real])]
    both = zip(split.parameters(), whole.parameters(), strict=True)
    return worst([*pairs, *((a.grad, b.grad) for a, b in both if b.grad is not None)])


def shared_prefixes(families: list[str]) -> dict[str, tuple[float, int, int]]:
    """Completions of a prompt with ``share_prefixes=True``: the largest error against each alone; the tokens that a
    layer runs on this rank, and those of the batch."""
    found = {}
    for family in families:
        whole, split = axattn.apply(build(family), "auto"), axattn.apply(build(family), "auto", share_prefixes=True)
        axattn.sequence_parallel(split, dist.group.WORLD, gather=True)
        ids = torch.cat([tokens(1, 40, 1).expand(4, -1), tokens(4, 9, 2)], 1)
        ids[3, :20] = tokens(1, 20, 7)  # it shares nothing
        mask = torch.ones_like(ids)
        mask[1, 45:] = 0
        given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        seen: list[int] = []
        norm = next(m for m in split.modules() if "norm" in type(m).__name__.lower())
        norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[-2]))
        got, wanted = split(**given), whole(**given, use_cache=False)
        got.loss.backward()
        wanted.loss.backward()
        axattn.parallel.average_gradients(split, dist.group.WORLD)
        both = zip(split.parameters(), whole.parameters(), strict=True)
        pairs = [(got.loss, wanted.loss), (got.logits[mask > 0], wanted.logits[mask > 0])]
        pairs += [(a.grad, b.grad) for a, b in both if b.grad is not None]
        found[family] = worst(pairs), seen[0], int(mask.sum())
    return found


def strategies() -> dict[str, str]:
    """How ``auto`` splits batches: of one document, of short ones, with heads that can't be divided."""
    from axattn.documents.forward_context import current

    odd = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    packed = {"input_ids": tokens(1, 24), "position_ids": positions((6, 6, 6, 6))}
    found = {}
    for what, sizes, given in (
        ("one", {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4}, {"input_ids": tokens(1, 24)}),
        ("packed", {}, packed),
        ("odd heads", odd, {"input_ids": tokens(1, 24)}),
    ):
        model = axattn.sequence_parallel(axattn.apply(build("llama", **sizes), "auto"), dist.group.WORLD)

        def note(*_: Any, what: str = what) -> None:
            context = current()
            assert context is not None
            assert context.shard is not None
            found[what] = "split" if context.shard.placement is None else "placed"

        model.model.layers[0].register_forward_pre_hook(note)
        model(**given, use_cache=False)
    return found


def faulty(names: dict[str, tuple[str, str, str, str] | None]) -> dict[str, float]:
    """The largest error with each fault, and without any.

    Args:
        names: for each fault a case of `errors`, None for `shared_prefixes`.
    """
    import pytest

    import tests.parallel.test_fetch  # it registers the faults
    from tests.faults import FAULTS

    def error(case: tuple[str, str, str, str] | None) -> float:
        if case is None:
            return max(error for error, *_ in shared_prefixes(["llama"]).values())
        (found,) = errors([case], "fetch").values()
        assert not isinstance(found, str), found
        return found

    assert tests.parallel.test_fetch.FAULTY
    found = {"none": max(map(error, set(names.values())))}
    for name, case in names.items():
        with pytest.MonkeyPatch.context() as patch:
            FAULTS[name].inject(patch)
            found[name] = error(case)
    return found


def grid() -> Any:
    """A mesh of two dimensions, the second of two ranks."""
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("keys", "heads"))


def packed_batch(seed: int, length: int = 24) -> dict[str, Any]:
    """One packed row with labels."""
    ids, where = tokens(1, length, seed), positions((5, 11, length - 16))
    return {"input_ids": ids, "position_ids": where, "labels": ids.masked_fill(where == 0, -100)}


def reference(
    batches: list[dict[str, Any]], family: str = "llama", **sizes: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one process that trains on the mean over `batches`."""
    model = axattn.apply(build(family, **sizes), "varlen").train()
    loss = sum(model(**batch, use_cache=False).loss for batch in batches) / len(batches)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative error of tensors by name."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    return worst((found[name], wanted[name]) for name in wanted)


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors by the model's own names, whatever wraps it."""
    found = {name.removeprefix("module."): x for name, x in tensors.items()}
    return {name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach() for name, x in found.items()}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Whole gradients by name."""
    return plain({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def shard(model: Any, mesh: Any) -> None:
    """FSDP2, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def hybrid_in_packed_rows(family: str, how: str) -> float:
    """The largest error of logits and gradients of a sharded or copied hybrid with checkpointed layers, against one
    process without checkpoints. Every rank has the same rows."""
    given = {"input_ids": tokens(2, 21), "position_ids": positions((7, 11, 3), (5, 16)), "use_cache": False}

    def step(model: Any) -> dict[str, torch.Tensor]:
        logits = model(**given).logits
        logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)))
        return {"logits": logits.detach(), **gradients(model)}

    wanted = step(axattn.apply(build(family), "auto").train())
    model = axattn.apply(build(family), "auto").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "FSDP2":
        shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    found = step(model)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    return worst((found[name], wanted[name]) for name in wanted)


def two_dimensions(order: str, strategy: str) -> tuple[float, float]:
    """FSDP2 over all four ranks, rows split over two: errors of loss and gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    flat = mesh["dp", "sp"]._flatten("all")
    batches = [packed_batch(1), packed_batch(2)]
    loss, wanted = reference(batches)
    model = axattn.apply(build("llama"), "varlen").train()
    if order == "before":
        axattn.sequence_parallel(model, mesh["sp"], strategy=strategy)
    shard(model, flat)
    if order == "after":
        axattn.sequence_parallel(model, mesh["sp"], strategy=strategy)
    mine = model(**batches[mesh["dp"].get_local_rank()]).loss
    mine.backward()
    mean = mine.detach().clone()
    dist.all_reduce(mean)
    return abs(float(mean) / 4 - loss), compare(gradients(model), wanted)


def with_lora() -> tuple[float, float]:
    """A LoRA model wrapped by DDP: errors of loss and gradients."""
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def make() -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(axattn.apply(build("llama"), "varlen"), lora).train()

    inputs, whole, split = packed_batch(1), make(), make()
    expected = whole(**inputs, use_cache=False).loss
    expected.backward()
    axattn.sequence_parallel(split, dist.group.WORLD)
    wrapped = torch.nn.parallel.DistributedDataParallel(split)
    loss = wrapped(**inputs).loss
    loss.backward()
    return abs(float(loss.detach() - expected.detach())), compare(gradients(wrapped), gradients(whole))


def outputs() -> dict[str, Any]:
    """What comes back in training, in evaluation, as a tuple, from ``generate``, and after `axattn.restore`."""
    inputs = packed_batch(1, 23)
    whole = axattn.apply(build("llama"), "varlen")
    model = axattn.sequence_parallel(axattn.apply(build("llama"), "varlen"), dist.group.WORLD)
    logits = whole(**inputs, use_cache=False).logits
    found: dict[str, Any] = {"training": list(model.train()(**inputs).logits.shape)}
    without = {key: value for key, value in inputs.items() if key != "labels"}
    found["no labels"] = worst([(model(**without).logits, logits)])  # in training: no cache is kept
    model.eval()
    found["evaluation"] = worst([(model(**inputs).logits, logits)])
    found["tuple"] = worst([(model(**inputs, return_dict=False)[1], logits)])
    hidden = model(**inputs, output_hidden_states=True).hidden_states
    expected = whole(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    found["hidden states"] = worst(zip(hidden, expected, strict=True))
    prompt = tokens(2, 7)
    given = {"max_new_tokens": 4, "do_sample": False}
    found["generate"] = bool((model.generate(prompt, **given) == whole.generate(prompt, **given)).all())
    found["switched"] = switched(model.train(), inputs)
    axattn.restore(model)
    found["restored"] = "forward" in vars(model)
    return found


def switched(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Shapes of a rank's logits after, inside and past changes of kernel, and the text of one that is refused."""
    shapes = [list(axattn.apply(model, "auto")(**inputs).logits.shape)]
    with axattn.using(model, "varlen"):
        shapes.append(list(model(**inputs).logits.shape))
    shapes.append(list(model(**inputs).logits.shape))
    try:
        axattn.apply(model, "eager")
    except axattn.AxattnError as error:
        return [*shapes, list(model(**inputs).logits.shape), str(error)]
    return shapes


def without_heads() -> dict[str, float]:
    """The largest error of hidden states and gradients of models that hold no other model."""
    found = {}
    for family in ("llama", "mistral", "gemma3"):
        for scenario in ("dense", "packed", "right padded", "left padded"):
            inputs = {key: value for key, value in batch(scenario).items() if key != "labels"}
            whole, split = (axattn.apply(build(family).model, "varlen").train() for _ in range(2))
            axattn.sequence_parallel(split, dist.group.WORLD)
            real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            states = [model(**inputs, use_cache=False).last_hidden_state[real] for model in (split, whole)]
            for state in states:  # (the sum of squares after an RMSNorm is constant)
                (state * torch.randn(state.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
            axattn.parallel.average_gradients(split, dist.group.WORLD)
            both = zip(split.parameters(), whole.parameters(), strict=True)
            found[f"{family} {scenario}"] = worst([tuple(states), *((a.grad, b.grad) for a, b in both)])
    return found


def passed_by() -> dict[str, Any]:
    """A forward in the place of the model's, which computes the loss from hidden states: the largest error, tokens that
    a layer saw, and the text of what is refused where it is not the inner model that is called."""
    import types

    inputs = packed_batch(1, 24)

    def fused(self: Any, labels: Any, **given: Any) -> Any:
        hidden = self.model(**given).last_hidden_state
        return torch.nn.functional.cross_entropy(self.lm_head(hidden[:, :-1])[0], labels[0, 1:])

    found: dict[str, Any] = {}
    for mean in (False, True):
        whole, split = (axattn.apply(build("llama"), "varlen").train() for _ in range(2))
        axattn.sequence_parallel(split, dist.group.WORLD)
        for model in (whole, split):
            model.forward = types.MethodType(fused, model)
        if mean:  # as with an accelerator, whose Trainer multiplies a rank's loss
            split.model.forward.change.change.mean = True
        seen: list[int] = []
        split.model.layers[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
        try:
            loss, expected = split(**inputs), whole(**inputs)
        except axattn.AxattnError as error:
            found["mean"] = str(error)
            continue
        loss.backward()
        expected.backward()
        axattn.parallel.average_gradients(split, dist.group.WORLD)
        both = zip(split.parameters(), whole.parameters(), strict=True)
        found["error"] = worst([(loss, expected), *((a.grad, b.grad) for a, b in both)])
        found["tokens"] = seen
    split.model.forward = types.MethodType(type(split.model).forward, split.model)
    try:
        split(**inputs)
    except axattn.AxattnError as error:
        found["passed by"] = str(error)
    return found


def modernbert() -> Any:
    """An encoder with a window to both sides."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tf.ModernBertConfig(**sizes, vocab_size=97, local_attention=8, pad_token_id=0)


def refusals() -> dict[str, str]:
    """The texts of what is refused, by what was tried."""
    import pickle

    found: dict[str, str] = {}
    world = dist.group.WORLD

    def tried(what: str, function: Any) -> None:
        try:
            function()
            found[what] = "accepted"
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"

    def model(family: str = "llama", name: str = "varlen", **options: Any) -> Any:
        return axattn.apply(build(family, **options), name)

    ready = axattn.sequence_parallel(model(), world)
    inputs = packed_batch(1)
    rank = dist.get_rank()
    tried("native name", lambda: axattn.sequence_parallel(model(name="sdpa"), world))
    tried("not applied", lambda: axattn.sequence_parallel(build("llama"), world))
    odd = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    ulysses = {"strategy": "ulysses"}
    tried("heads", lambda: axattn.sequence_parallel(model(**odd), world, **ulysses))
    tried("strategy", lambda: axattn.sequence_parallel(model(), world, strategy="ring"))
    square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("keys", "heads"))
    tried("both", lambda: axattn.sequence_parallel(model(), square, **ulysses))
    tried("both, a state", lambda: axattn.sequence_parallel(model("bamba", "auto"), square))
    sided = tf.ModernBertForMaskedLM(modernbert())
    tried("both sides", lambda: axattn.sequence_parallel(axattn.apply(sided, "auto"), world, strategy="fetch"))
    tried("no stems", lambda: axattn.sequence_parallel(model(name="s2"), world, strategy="fetch"))
    windows = axattn.sequence_parallel(model("mistral"), world, strategy="fetch")
    holes = torch.ones(1, 24, dtype=torch.long).index_fill(1, torch.tensor([7]), 0)
    tried("holes", lambda: windows(tokens(1, 24), attention_mask=holes, use_cache=False))
    tried("s2", lambda: axattn.sequence_parallel(model(name="s2"), world))
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    tried("rope", lambda: axattn.sequence_parallel(model(**rope), world))
    tried("temperature", lambda: axattn.sequence_parallel(model("llama4", no_rope_layers=[1, 0]), world))
    tried("router", lambda: axattn.sequence_parallel(model("mixtral", output_router_logits=True), world))
    rows = tf.LlamaForSequenceClassification(CONFIGS["llama"]())
    tried("one a row", lambda: axattn.sequence_parallel(axattn.apply(rows, "varlen"), world))
    other_head = tf.LlamaForTokenClassification(CONFIGS["llama"]())
    tried("own loss", lambda: axattn.sequence_parallel(axattn.apply(other_head, "varlen"), world))
    tried("bamba", lambda: axattn.sequence_parallel(model("bamba", "auto"), world, **ulysses))
    tried("twice", lambda: axattn.sequence_parallel(ready, world))
    tried("group", lambda: axattn.sequence_parallel(model(), "world"))
    mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("dp", "keys", "heads"))
    tried("mesh", lambda: axattn.sequence_parallel(model(), mesh))
    tried("other batch", lambda: ready(**packed_batch(1 + rank)))
    other = inputs | {"labels": inputs["labels"] + (inputs["labels"] > 0) * rank}
    tried("other labels", lambda: ready(**other))
    tried("other length", lambda: ready(**packed_batch(1, 24 + rank)))
    tried("weights", lambda: ready(**inputs, output_attentions=True))
    tried("unknown input", lambda: ready(**inputs, pixel_values=torch.ones(1, 3, 4, 4)))
    tried("mask", lambda: ready(tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8), use_cache=False))
    tried("keep", lambda: ready(**inputs, logits_to_keep=1))
    tried("pickle", lambda: pickle.dumps(ready))
    tried("after all that", lambda: ready(**inputs))
    tried("a copy", lambda: copy.deepcopy(ready)(**inputs))
    return found


def compiled(parts: tuple[str, ...], strategy: str) -> dict[str, float]:
    """The whole model, its inner model, or its layers compiled, on packed rows of two lengths: loss, gradients."""
    found = {}
    batches = [packed_batch(1), packed_batch(2, 30)]
    loss, wanted = reference(batches, num_hidden_layers=1)
    for part in parts:
        torch._dynamo.reset()
        model = axattn.apply(build("llama", num_hidden_layers=1), "varlen").train()
        axattn.sequence_parallel(model, dist.group.WORLD, strategy=strategy)
        for each in {"whole": [model], "inner": [model.model], "layers": list(model.model.layers)}[part]:
            each.compile(backend="eager")
        losses = [model(**batch, use_cache=False).loss for batch in batches]
        (sum(losses) / len(batches)).backward()
        axattn.parallel.average_gradients(model, dist.group.WORLD)
        found[part] = max(abs(float(sum(losses)) / len(batches) - loss), compare(gradients(model), wanted))
    return found


def inside_context_parallel() -> str:
    """torch's own context parallelism around a model on axattn."""
    from torch.distributed.tensor.experimental import context_parallel

    model = axattn.apply(build("llama"), "varlen")
    ids = tokens(1, 16)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    try:
        with context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
            model(ids, use_cache=False)
    except axattn.UnsupportedAttentionError as error:
        return str(error)
    return "accepted"


def corpus(count: int, longest: int = 30) -> list[dict[str, list[int]]]:
    """Documents of random lengths."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(5, longest, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 97, (n,), generator=generator).tolist()} for n in lengths]


def pretend_accelerator() -> None:
    """Accelerate (1.15) keeps FSDP for machines with accelerators; what it does there runs on CPU and gloo too."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_HPU


def trained(folder: str, mode: str, options: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a Trainer run of four steps.

    Args:
        folder: for the Trainer.
        mode: ``"one"`` process, ``"ddp"``, ``"balanced"``: DDP with rows of equal work that process 0 makes for all,
            ``"fsdp"``, or FSDP2 with rows split over two ranks: ``"rows"`` by fetching keys, ``"heads"`` by exchanging
            heads.
        options: for `TrainingArguments`.
    """
    from transformers import Trainer, TrainingArguments

    world = 1 if mode == "one" else dist.get_world_size()
    model = axattn.prepare_for_training(axattn.apply(build("llama"), "varlen")).train()
    rows = 1 if mode in ("rows", "heads", "balanced") else world
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 8 // rows,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "use_cpu": True,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "seed": 1,
        "disable_tqdm": True,
    } | options
    if mode in ("fsdp", "rows", "heads"):
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        settings |= {"fsdp": True, "fsdp_config": wrap}
    if mode in ("rows", "heads"):
        settings["parallelism_config"] = axattn.parallel.accelerate_config(world)
    packing: dict[str, Any] = {}
    if mode == "balanced":
        settings["accelerator_config"] = {"dispatch_batches": True, "split_batches": True}
        packing = {"balance": "flops", "ranks": world, "return_lengths": False}
    arguments = TrainingArguments(output_dir=folder, **settings)
    if mode in ("fsdp", "rows", "heads"):
        pretend_accelerator()
    collator = axattn.PackingCollator(64, **packing)
    trainer = Trainer(model, arguments, train_dataset=corpus(32), data_collator=collator)
    if mode in ("rows", "heads"):
        axattn.sequence_parallel(model, trainer.accelerator, strategy="fetch" if mode == "rows" else "ulysses")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, plain(dict(trainer.model_wrapped.named_parameters()))


def from_meta(order: str) -> dict[str, Any]:
    """A model made on the meta device, sharded by FSDP2, filled, patched before or after; packed against one process.

    Args:
        order: of patches and wrapping: ``"before"`` or ``"after"``.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from transformers import AutoModelForCausalLM

    inputs = packed_batch(1)
    loss, wanted = reference([inputs])
    source = build("llama")
    keys = list(source.state_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    if order == "before":
        axattn.apply(model, "varlen")
    shard(model, init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(source.config)
    set_model_state_dict(model, source.state_dict(), options=StateDictOptions(full_state_dict=True))
    if order == "after":
        axattn.apply(model, "varlen")
    found: dict[str, Any] = {"keys": list(get_model_state_dict(model)) == keys}
    mine = model.train()(**inputs, use_cache=False).loss
    mine.backward()
    found["loss"] = abs(float(mine.detach()) - loss)
    found["gradients"] = compare(gradients(model), wanted)
    found["served"] = {kernel for layer in axattn.status(model).layers for kernel in layer.served}
    axattn.restore(model)
    found["restored"] = model.config._attn_implementation
    return found
