"""Packed ternary weight times int8 codes: `layout.py` packs, `reference.py` defines the product."""
