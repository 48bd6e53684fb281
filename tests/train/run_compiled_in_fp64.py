"""`fastdino train` in double precision, with one block and no C++ compiler, which would take minutes: for torchrun."""

import sys
from functools import partial

import torch

from fastdino.cli import main
from fastdino.model import ARCHITECTURES

if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    torch.compile = partial(torch.compile, backend="aot_eager")
    ARCHITECTURES["vit_nano"] = partial(ARCHITECTURES["vit_nano"], depth=1)
    sys.exit(main(["train", *sys.argv[1:]]))
