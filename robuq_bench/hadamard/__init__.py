"""Hadamard matrices and transforms of any order that has a construction."""
