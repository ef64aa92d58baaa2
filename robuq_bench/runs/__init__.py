"""Run folders: results, checkpoints, provenance, locks."""
