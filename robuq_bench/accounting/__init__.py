"""Bits, operations and bytes of a plan."""
