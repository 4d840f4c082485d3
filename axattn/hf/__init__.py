"""All that holds only while Transformers, torch and PEFT keep their shape, with a check for each. No attention here."""
