"""Diffusion transformers and their checkpoints."""
