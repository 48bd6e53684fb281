"""--fsdp: networks in parts on two and on four processes are those of one, and so is what a run leaves behind."""

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import masked_steps
import pytest
import torch
from sharded_processes import ON_FOUR, SCENARIOS, steps, weights
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

import fastdino
from fastdino import cli, load_checkpoint
from fastdino.errors import UserError
from fastdino.train import sharded_checkpoint
from fastdino.train.checkpoint import save_checkpoint
from fastdino.train.config import TrainConfig

HERE = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
FLAGS = "--epochs 2 --warmup_epochs 0 --freeze_last_layer 1 --out_dim 64 --hidden_dim 32 --bottleneck_dim 16"
FLAGS += " --use_bn_in_head false --drop_path_rate 0 --local_crops_number 2 --num_workers 0 --knn_freq 1"
FLAGS += " --clip_grad 0.3 --lr 0.0005 --arch vit_nano --patch_size 12 --global_crops_size 24 --local_crops_size 12"
FLAGS += " --attention_images 0 --preset none --resume true"
BATCH = 16


@pytest.mark.parametrize("processes", [2, 4])
def test_parts_learn_what_one_piece_learns(processes, forks, tmp_path):
    path = os.pathsep.join([str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = HERE / "sharded_processes.py", f"file://{tmp_path}/store"
    all_ = forks.run_ranks(processes, *words, env=os.environ | {"PYTHONPATH": path})
    assert not any(done.returncode for done in all_), "".join(done.stderr for done in all_)
    seen = json.loads("".join(done.stdout for done in all_))  # process 0 alone tells
    assert {name for name in seen if name in SCENARIOS} == set(SCENARIOS if processes == 2 else ON_FOUR)
    for name in seen.keys() & SCENARIOS.keys():
        step, metrics = steps(SCENARIOS[name], processes)
        found = torch.tensor(seen[name]["weights"], dtype=torch.float64)
        assert torch.allclose(found, weights(step)[::97], rtol=0, atol=1e-10), name
        assert seen[name]["grad_norm"] == pytest.approx(float(metrics.grad_norm), rel=1e-10), name
        assert seen[name]["share"] < 1.06 / processes, name  # of the weights; rows do not divide evenly
    if processes == 4:
        return
    in_bf16, kinds = seen["bf16"], {"master": "float32", "grad": "float32", "cls": "float32", "logits": "bfloat16"}
    assert {name: in_bf16[name] for name in kinds} == {name: f"torch.{kind}" for name, kind in kinds.items()}
    step = masked_steps.make_step("dinov3", koleo=0.0, amp_dtype=torch.bfloat16, accumulate=processes)
    views = [masked_steps.make_views(i, n_parts=processes) for i in range(3)]
    assert in_bf16["losses"] == pytest.approx([float(step(x, i).loss) for i, x in enumerate(views)], rel=2e-2)


def program(processes, images, folder):
    share = ["--batch_size_per_gpu", str(BATCH // processes), "--data_path", str(images), "--output_dir", str(folder)]
    return ["-m", "fastdino.train", *FLAGS.split(), *share]


def kill(folder):
    """All processes of the run there: those of torchrun have groups of their own."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder) in path.read_text():
                os.kill(int(path.parent.name), signal.SIGKILL)


def test_a_killed_run_goes_on_with_another_number_of_processes(photo_folder, tmp_path, forks):
    """Twenty seconds on two cores, which seven processes share."""
    folder, one = tmp_path / "run", tmp_path / "one"
    words = [*LAUNCH, "--nproc_per_node=2", *program(2, photo_folder, folder), "--fsdp", "true"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started = time.monotonic()
    while not (folder / "checkpoint.dcp" / "run.pth").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() - started < 120
        time.sleep(0.05)
    kill(folder)
    process.communicate()
    (folder / "checkpoint.dcp" / "shards-00000000").mkdir()  # of a run that was killed while it saved

    parts = ["--fsdp", "true", "--dist_url", f"file://{tmp_path}/store"]
    runs = forks.run_ranks(4, *program(4, photo_folder, folder), *parts)
    runs.append(forks.run(*program(1, photo_folder, one)))
    assert [run.returncode for run in runs] == [0] * 5, "".join(run.stdout + run.stderr for run in runs)
    said = "".join(run.stdout + run.stderr for run in runs[:4])
    assert f"resumed {folder}/checkpoint.dcp/run.pth after 1 epoch" in said
    assert "Warning" not in said
    expected, found = (load_checkpoint(path / "checkpoint.pth") for path in (one, folder))
    assert expected.keys() == found.keys()
    assert expected["optimizer"]["state"].keys() == found["optimizer"]["state"].keys()
    for part in ("student", "teacher", "dino_loss"):
        assert expected[part].keys() == found[part].keys()
        for name, value in expected[part].items():
            other = found[part][name]
            if name.endswith("attn.qkv.bias"):  # the keys' third walks on rounding noise
                value, other = (torch.cat([x[: len(x) // 3], x[2 * len(x) // 3 :]]) for x in (value, other))
            assert float((other - value).abs().max()) < 2e-5, name
    current = load_checkpoint(folder / "checkpoint.dcp" / "run.pth")["shards"]
    assert [path.name for path in (folder / "checkpoint.dcp").glob("shards-*")] == [current]
    names = ("checkpoint.dcp", "checkpoint.pth", "backbone.pth")
    first, *others = (fastdino.load_backbone(folder / name).state_dict() for name in names)
    for name, value in first.items():
        assert all(torch.equal(value, other[name]) for other in others), name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint.dcp as one process writes it, after a step."""
    # Other tests' device has no streams, for which DCP asks whatever accelerator there is.
    if fake := getattr(torch, torch._C._get_privateuse1_backend_name(), None):
        monkeypatch.setattr(fake, "is_available", lambda: False, raising=False)
    step, folder = masked_steps.make_step(), tmp_path / "run" / "checkpoint.dcp"
    step(masked_steps.make_views(), 0)
    networks = {"student": step.student, "teacher": step.teacher, "optimizer": step.update.optimizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        shards = sharded_checkpoint.write(folder, sharded_checkpoint.in_parts(**networks))
    save_checkpoint(folder / "run.pth", **networks, loss=step.loss, epoch=1, config=TrainConfig(), shards=shards)
    return folder


def test_it_is_put_into_another_step(folder):
    step = masked_steps.make_step()
    parts = {"student": step.student, "teacher": step.teacher, "optimizer": step.update.optimizer, "loss": step.loss}
    sharded_checkpoint.restore(folder, load_checkpoint(folder / "run.pth"), **parts, optimizer_name="adamw")
    held = load_checkpoint(folder)
    assert all(torch.equal(x, held["student"][f"module.{name}"]) for name, x in step.student.state_dict().items())
    state = step.update.optimizer.state_dict()["state"]
    assert state.keys() == held["optimizer"]["state"].keys()
    assert all(torch.equal(x, held["optimizer"]["state"][i][key]) for i in state for key, x in state[i].items())


def test_parts_of_another_model_are_refused(folder):
    step = masked_steps.make_step(networks=masked_steps.make_networks("dinov3"))
    parts = {"student": step.student, "teacher": step.teacher, "optimizer": step.update.optimizer, "loss": step.loss}
    before = [p.detach().clone() for p in step.student.parameters()]
    with pytest.raises(UserError, match="the checkpoint is of another model: student: "):
        sharded_checkpoint.restore(folder, load_checkpoint(folder / "run.pth"), **parts, optimizer_name="adamw")
    assert all(map(torch.equal, before, step.student.parameters()))


def test_without_fsdp_its_folder_is_not_overwritten(folder, capsys):
    assert cli.main(["train", *FLAGS.split(), "--output_dir", str(folder.parent)]) == 2
    assert "which is of a run with --fsdp true: go on with that" in capsys.readouterr().err


class Pickled:
    """Is read back by calling a function."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def read_metadata(content):
    return sharded_checkpoint._MetadataUnpickler(io.BytesIO(pickle.dumps(content))).load()


def test_members_of_an_enumeration_are_read_as_any_python_writes_them():
    """Python 3.11.2 writes getattr(class, name)."""
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read_metadata(Pickled(getattr, (_MEM_FORMAT_ENCODING, member.name))) is member
    assert read_metadata(Pickled(_MEM_FORMAT_ENCODING, (member.value,))) is member
    for of, name in ((torch.Size, "mro"), (_MEM_FORMAT_ENCODING, "mro")):
        with pytest.raises((UserError, KeyError)):
            read_metadata(Pickled(getattr, (of, name)))


def spoil(shards, how):
    metadata, parts = shards / ".metadata", sorted(shards.glob("*.distcp"))
    if how == "code":
        metadata.write_bytes(pickle.dumps(Pickled(os.system, (f"touch {shards.parent / 'ran'}",))))
    elif how == "cut metadata":
        metadata.write_bytes(metadata.read_bytes()[:100])
    elif how == "no metadata":
        metadata.unlink()
    elif how == "a part missing":
        parts[0].unlink()
    elif how == "a part cut":
        parts[0].write_bytes(parts[0].read_bytes()[:1000])
    elif how == "a part overwritten":
        parts[0].write_bytes(b"junk" * (parts[0].stat().st_size // 4))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("code", "holds pickled code, which is refused: posix.system"),
        ("cut metadata", "cannot be read: "),
        ("no metadata", "cannot be read: FileNotFoundError"),
        ("a part missing", "bytes that it claims are not there"),
        ("a part cut", "bytes that it claims are not there"),
        ("a part overwritten", "cannot be read: "),
    ],
)
def test_damaged_parts_are_one_line(folder, how, words):
    spoil(next(folder.glob("shards-*")), how)
    with pytest.raises(UserError) as raised:
        load_checkpoint(folder)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shards": "../elsewhere"}, "names no parts"),
        ({"shards": None}, "names no parts"),
        ({"optimizer": None}, "does not name the optimizer's parameters"),
        ({"epoch": "three"}, "the checkpoint's epoch is 'three', expected a whole number"),
        ({"dino_loss": []}, "the checkpoint is of another model: dino_loss"),
    ],
    ids=str,
)
def test_an_odd_run_pth_is_one_line(folder, change, words):
    run = load_checkpoint(folder / "run.pth") | change
    torch.save(run, folder / "run.pth")
    step = masked_steps.make_step()
    parts = {"student": step.student, "teacher": step.teacher, "optimizer": step.update.optimizer, "loss": step.loss}
    reads = partial(sharded_checkpoint.restore, folder, run, **parts, optimizer_name="adamw")
    if "optimizer" in change:
        reads = partial(load_checkpoint, folder)
    with pytest.raises(UserError) as raised:
        reads()
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--fsdp: expected several processes: torchrun"),
        ("--use_bn_in_head true", "--use_bn_in_head: expected false with --fsdp, whose heads are in parts, got true"),
        ("--step graph", "--step: expected auto or eager with --fsdp, got graph"),
        ("--optimizer lars", "--optimizer: expected adamw with --fsdp, got lars"),
        ("--amp_dtype fp16", "--amp_dtype: expected auto or bf16 with --fsdp, got fp16"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, words, tmp_path, capsys):
    command = ["train", *FLAGS.split(), "--fsdp", "true", *flags.split(), "--output_dir", str(tmp_path / "run")]
    assert cli.main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
