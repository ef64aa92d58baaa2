"""How long, how much memory, and how near to the hardware: what the studies of speed measure by.

- `statistics`: medians, spread and the rule for "faster"; pure, needs no GPU.
- `timing`: interleaved rounds over stopwatches; CUDA-graph replays are one kind of stopwatch.
- `cpu`: calls in turns on a CPU, threads, instruction sets, and the peaks that this CPU reached.
- `int8_peer`: torch's own 8-bit linears for a CPU.
- `ceilings`: copy bandwidth and matmul rates of this device, measured.
- `roofline`: bytes and operations of a layer, data-sheet peaks, the end-to-end model of a DiT.
- `memory`: peak memory as weights, activations and workspace.
- `record`: finished runs as JSON files for `reports/recorded`.
"""
