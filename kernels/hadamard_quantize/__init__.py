"""Tokens to integer codes: normalise, modulate, rotate and quantize in one pass over memory."""
