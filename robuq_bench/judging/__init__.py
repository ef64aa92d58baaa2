"""Samples, feature networks, fidelity metrics and the evaluation protocol."""
