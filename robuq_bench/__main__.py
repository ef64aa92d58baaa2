"""`python -m robuq_bench` is `python bench.py`."""

from __future__ import annotations

import sys

from robuq_bench.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
