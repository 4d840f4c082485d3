"""Everything that depends on internals of Transformers, torch and PEFT, with checks (contracts). No attention here."""
