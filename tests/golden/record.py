"""Record what the packaged plans compute today: `python tests/golden/record.py`, from a checkout.

Run it only where a change of numbers is meant, and say so in the commit: it replaces what
`test_golden.py` compares with. Everything is recorded on one thread, on this machine, by torch
alone.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write assets/golden.json and assets/golden.safetensors."""
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
    os.environ["ROBUQ_CPU_KERNELS"] = "off"
    import torch
    from safetensors.torch import save_file

    compute = import_module("compute")
    torch.set_num_threads(1)
    inputs = compute.fixed_inputs()
    teacher = compute.library.teacher()
    tensors = {f"inputs/{name}": value for name, value in inputs.items()}
    plans = {}
    for name in compute.PLANS:
        plans[name], outputs = compute.of_plan(name, teacher, inputs)
        tensors |= outputs
        print(name, flush=True)
    record = {
        "fingerprint": compute.fingerprint(),
        "plans": plans,
        "methods": compute.of_methods(),
    }
    compute.ASSETS.mkdir(exist_ok=True)
    (compute.ASSETS / "golden.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    save_file(tensors, compute.ASSETS / "golden.safetensors")


if __name__ == "__main__":
    main()
