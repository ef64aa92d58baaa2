"""Kernels of ternary networks: one folder per operation, `reference.py` beside `triton.py`.

- `hadamard_quantize`: [residual + gate] [LayerNorm + modulate] Hadamard, per-token codes.
- `ternary_matmul`: packed ternary weight times int8 codes, with the epilogues of a transformer.
- `quantized_attention`: attention whose two products multiply integers.
- `fake_quantize`: Hadamard and fake quantization of training, forward and backward.
- `ternary_weight`: fake-quantized ternary weight of training.
- `normality_sums`: for a CPU alone, the sums of a normality test; `robuq_bench.normality` has the
  reference.

A reference is plain PyTorch, runs on any device and defines what the kernel computes. A kernel runs
on a CUDA device, or anywhere in Triton's interpreter (`TRITON_INTERPRET=1`, set before the first
import of this package). `python -m kernels.offline` compiles every kernel for sm_90 without a GPU
and reads its machine code. `cpu.cpp` and `cpu.py` are for the CPU, compiled by an
installation or by `python -m kernels.build`. This package imports torch and triton only.
"""

import os

# Triton 3.9 warns that fused multiply-add stops being its default; rounding must not move with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
