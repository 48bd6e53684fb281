"""A program of the original on a CPU: `python original_on_cpu.py FOLDER eval_knn.py FLAGS...`, FOLDER its checkout.

Its evaluations ask for CUDA and for names that libraries have dropped since. Here `.cuda()` stays where it is, and one
process meets itself over gloo. What it rounds before it prints is left in values.pth, where the program was called.
With CENTER_CROPS=1 it trains on the crops that it tests on.
"""

import io
import os
import runpy
import sys
import urllib.request
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn


def on_cpu(function: Any) -> Any:
    """Without the device that a call names."""
    names = {"device", "device_ids"}
    return lambda *args, **kwargs: function(*args, **{k: v for k, v in kwargs.items() if k not in names})


def main(folder: str, program: str, *flags: str) -> None:
    sys.path.insert(0, folder)
    import utils

    def start(args: Any) -> None:
        args.gpu = None
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def loaded(*args: Any, load: Any = torch.load, **kwargs: Any) -> Any:
        return load(*args, **kwargs, weights_only=False)

    palette = io.BytesIO(b"0 0 0\n255 0 0\n0 255 0\n0 0 255\n" * 64)  # what the video program downloads
    if not hasattr(Image, "ANTIALIAS"):
        Image.ANTIALIAS = Image.Resampling.LANCZOS  # type: ignore[attr-defined]
    np.__dict__.setdefault("in1d", np.isin)
    if os.environ.get("CENTER_CROPS"):
        from torchvision import transforms

        transforms.RandomResizedCrop = lambda size: transforms.Compose(  # type: ignore[misc,assignment]
            [transforms.Resize(size * 8 // 7, interpolation=3), transforms.CenterCrop(size)]
        )
        transforms.RandomHorizontalFlip = nn.Identity  # type: ignore[misc,assignment]
    sys.argv = [program, *flags]
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self, **_: self),
        mock.patch.object(nn.Module, "cuda", lambda self: self),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch, "tensor", on_cpu(torch.tensor)),
        mock.patch.object(torch, "load", loaded),
        mock.patch.object(nn.parallel, "DistributedDataParallel", on_cpu(nn.parallel.DistributedDataParallel)),
        mock.patch.object(utils, "init_distributed_mode", start),
        mock.patch.object(urllib.request, "urlopen", return_value=palette),
    ):
        names = runpy.run_path(f"{folder}/{program}", run_name="__main__")
    values = {name: value for name, value in names.items() if isinstance(value, (torch.Tensor, np.ndarray, float))}
    torch.save(values | precisions(names), "values.pth")


def precisions(names: dict[str, Any]) -> dict[str, list[float]]:
    """Of the copies' program: the average precision of each query."""
    if "score_ap_from_ranks_1" not in names:
        return {}
    found: list[float] = []
    score, evaluate = names["score_ap_from_ranks_1"], names["dataset"].eval_result

    def keep(*args: Any) -> float:
        found.append(score(*args))
        return found[-1]

    with mock.patch.dict(evaluate.__func__.__globals__, score_ap_from_ranks_1=keep):
        evaluate(names["indices"], names["distances"])
    return {"precisions": found}


if __name__ == "__main__":
    main(*sys.argv[1:])
