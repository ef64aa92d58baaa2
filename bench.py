"""The suite's one command: `python bench.py --help`."""

import sys

from robuq_bench.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
