"""``axattn plan MODEL``: which kernel each layer of a model gets, and why not the others. Loads no weights."""

from __future__ import annotations

import typer

from axattn.cli.completion import attention_names, machines


def plan(
    model: str = typer.Argument(..., metavar="MODEL", help="Local folder, config.json, or hub name."),
    attn: str = typer.Option(
        "auto",
        "--attn",
        metavar="NAME",
        autocompletion=attention_names,
        help="Attention implementation to plan for.",
    ),
    route: bool = typer.Option(False, "--route", help="Route layers that NAME can't serve to the next exact kernel."),
    upgrade_flash: bool = typer.Option(
        True, "--upgrade-flash/--no-upgrade-flash", help="Let flash_attention_2 run as flash_attention_4."
    ),
    environment: str = typer.Option(
        "",
        "--environment",
        metavar="MACHINE",
        autocompletion=machines,
        help="sm80, sm86, sm89, sm90, sm100, sm120, rocm6, cpu, or a JSON file of `axattn doctor`.",
    ),
    seq_len: int = typer.Option(
        0, "--seq-len", metavar="TOKENS", min=0, help="Costs are estimated at this length (0: 4,096, table only)."
    ),
    as_json: bool = typer.Option(False, "--json", help="Machine-readable output."),
) -> None:
    """Show which kernel each layer of a model gets, why not the others, and what each costs. No weights are loaded.

    Examples:
        axattn plan ./my-model

        axattn plan ./my-model --attn varlen --route --json

        axattn plan ./my-model --environment sm90 --seq-len 8192
    """
    from axattn.cli.output import print_json, quiet_transformers, user_errors
    from axattn.hf.checkpoints import require_source

    with user_errors(as_json):
        require_source(model)  # before Transformers is imported
        quiet_transformers()
        from dataclasses import asdict

        import axattn
        from axattn.machine.presets import machine
        from axattn.planning.alternatives import alternatives
        from axattn.planning.estimates import estimate, total
        from axattn.planning.routes import OnUnsupported
        from axattn.tools.axolotl.config import COMPUTED, AttentionConfig

        there = machine(environment) if environment else None
        policy: OnUnsupported = "route" if route else "raise"
        found = axattn.plan(model, attn, environment=there, on_unsupported=policy, upgrade_flash=upgrade_flash)
        flags = AttentionConfig(attn_implementation=attn).resolve(found)
        if as_json:
            value = found.to_dict()
            value["flags"] = {name: getattr(flags, name) for name in COMPUTED}
            if seq_len:
                value["estimate"] = {"seq_len": seq_len, **asdict(total(found, seq_len))}
                for shown, entry in zip(value["layers"], found.layers, strict=True):
                    shown["estimate"] = asdict(estimate(entry, seq_len))
                    others = alternatives(entry, found.environment, seq_len)
                    shown["alternatives"] = [other.to_dict() for other in others]
            print_json(value)
        else:
            from axattn.tools.tables import print_plan

            print_plan(found, seq_len=seq_len, flags=flags, assumed=bool(environment) and "." not in environment)
