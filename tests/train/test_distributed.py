"""Two processes of half a batch are one process of a whole one.

That torchrun starts them is tested in tests/test_readme.py and tests/train/test_fsdp.py.
"""

import subprocess
from pathlib import Path

import pytest
import torch

from fastdino import load_checkpoint

COMPILED_FP64 = str(Path(__file__).with_name("run_compiled_in_fp64.py"))
# Three steps of ten photographs: one epoch, so also the last layer's freeze, lifted for it to move.
FLAGS = "--epochs 1 --warmup_epochs 0 --freeze_last_layer 0 --out_dim 64 --hidden_dim 32 --bottleneck_dim 16"
FLAGS += " --use_bn_in_head false --drop_path_rate 0 --local_crops_number 2 --num_workers 0 --knn_freq 0"
FLAGS += " --clip_grad 0.3 --lr 0.0005 --arch vit_nano --patch_size 12 --local_crops_size 12 --attention_images 0"
FLAGS += " --preset none --global_crops_size 24"


def as_forks(forks, folder, processes, *words):
    """What torchrun would start, with what all of them said put together."""
    all_ = forks.run_ranks(processes, *words, "--dist_url", f"file://{folder}.store")
    code = next(filter(None, (done.returncode for done in all_)), 0)
    said = ("".join(getattr(done, stream) for done in all_) for stream in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, code, *said)


@pytest.mark.parametrize(
    ("program", "mode", "dtype", "budget"),
    [
        (["-m", "fastdino.train"], "eager", torch.float32, 1e-5),
        ([COMPILED_FP64], "compiled", torch.float64, 1e-10),  # fp64 has no flag and needs a script
    ],
    ids=["eager-fp32", "compiled-fp64"],
)
def test_two_processes_equal_one(photo_folder, tmp_path, forks, program, mode, dtype, budget):
    weights = []
    for processes, step in ((1, "eager"), (2, mode)):  # the one is eager: compiling is not to change anything either
        folder = tmp_path / str(processes)
        flags = ["--data_path", photo_folder, "--batch_size_per_gpu", 10 // processes, "--step", step]
        done = as_forks(forks, folder, processes, *program, *FLAGS.split(), *flags, "--output_dir", folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("teacher entropy") == 1  # rank 0 alone speaks
        assert "using eager" not in done.stdout  # nothing fell back
        checkpoint = load_checkpoint(folder / "checkpoint.pth")
        assert {float(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {3.0}
        weights.append(
            {f"{part}.{k}": v for part in ("student", "teacher", "dino_loss") for k, v in checkpoint[part].items()}
        )
    one, two = weights
    assert next(iter(one.values())).dtype == dtype
    for key, value in one.items():
        other = two[key]
        if key.endswith("attn.qkv.bias") and dtype == torch.float32:  # the keys' third walks on rounding noise
            value, other = (torch.cat([x[: len(x) // 3], x[2 * len(x) // 3 :]]) for x in (value, other))
        assert float((other - value).abs().max()) < budget, key


def test_batchnorm_across_processes_on_cpu_is_refused(tmp_path, forks):
    folder = tmp_path / "run"
    flags = [*FLAGS.split(), "--use_bn_in_head", "true", "--output_dir", str(folder)]
    done = as_forks(forks, folder, 2, "-m", "fastdino.train", *flags)
    assert done.returncode != 0
    assert "--use_bn_in_head true needs SyncBatchNorm across processes, which PyTorch has on GPUs only" in done.stderr
    assert "fastdino/train" not in done.stderr  # no traceback through our code
    assert not folder.exists()
