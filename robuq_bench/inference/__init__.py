"""Quantized models as they are stored and run: packed codes, one file, exchangeable arithmetic.

`export_packed` and `load_packed` write and read one self-describing file; `pack_` turns the
fake-quantized layers of a trained model into `PackedLinear`s (ternary codes) and `PackedUniform`s
(2 to 8 bits) in memory, whatever packaged methods are in their other slots;
`prepare_for_inference` chooses what computes their products: "reference" all of them, the others
those with ternary weights and methods that the kernels know; `cuda_graph` captures a call on a GPU.
"""

from robuq_bench.inference.graph import cuda_graph
from robuq_bench.inference.packed_file import export_packed, load_packed
from robuq_bench.inference.packed_linear import PackedLinear, pack_
from robuq_bench.inference.packed_uniform import PackedUniform
from robuq_bench.inference.prepare import prepare_for_inference

__all__ = [
    "PackedLinear",
    "PackedUniform",
    "cuda_graph",
    "export_packed",
    "load_packed",
    "pack_",
    "prepare_for_inference",
]
