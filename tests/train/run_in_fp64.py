"""`fastdino train` with every float in double precision: what a test starts under torchrun."""

import sys

import torch

from fastdino.cli import main

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    sys.exit(main(["train", *sys.argv[1:]]))
