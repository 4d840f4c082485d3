"""A packed fine-tune end to end: data, training, proofs, report. ``axattn demo`` runs `axattn.tools.demo.job.run`."""
