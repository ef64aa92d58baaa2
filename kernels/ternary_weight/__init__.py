"""Fake quantization of ternary weights in training."""
