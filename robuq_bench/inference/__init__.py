"""Quantized models as they are stored and run: packed codes, one file, exchangeable arithmetic.

`export_packed` and `load_packed` write and read one self-describing file; `pack_` turns the
fake-quantized layers of a trained model into `PackedLinear`s in memory; `prepare_for_inference`
chooses what computes their products.
"""

from robuq_bench.inference.packed_file import export_packed, load_packed
from robuq_bench.inference.packed_linear import PackedLinear, pack_
from robuq_bench.inference.prepare import prepare_for_inference

__all__ = ["PackedLinear", "export_packed", "load_packed", "pack_", "prepare_for_inference"]
