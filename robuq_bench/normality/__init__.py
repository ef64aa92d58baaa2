"""Is a token normal after a rotation: statistics per token, and what they mean for quantization."""
