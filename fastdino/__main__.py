"""`python -m fastdino`, `torchrun -m fastdino`: the same as `fastdino`."""

import sys

from fastdino.cli import main

if __name__ == "__main__":
    sys.exit(main())
