"""`python -m fastdino.train`: what torchrun starts. The same as `fastdino train`."""

import sys

from fastdino.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
