"""The main job end to end: data, training, proofs and report. ``axattn demo`` runs `axattn.tools.demo.job.run`."""
