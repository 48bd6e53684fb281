"""Checkpoints that cannot be used, and runs that go on with other arguments: every one is answered in words.

cd tests && python -m trials.checkpoints [--quick]
"""

import copy
import io
import os
import pickle
import random
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trials.runs import Ended, Table, last_line, run, trial_parser

from fastdino.train.checkpoint import load_checkpoint

Content = dict[str, Any]
SEED = 0


class RunsCode:
    """What a pickle must not do."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/fastdino_ran_code",)


def flipped(data: bytes) -> bytes:
    """One bit in the middle of the largest tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    changed = bytearray(data)
    changed[largest.header_offset + largest.file_size // 2] ^= 64
    return bytes(changed)


def deflated(data: bytes) -> bytes:
    """The same archive, compressed, with a member that is 4 GiB of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        with new.open("checkpoint/data/99999", "w") as huge:
            for _ in range(64):
                huge.write(bytes(2**20))
    return out.getvalue()


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a text": lambda data: b"not a checkpoint\n",
    "a picture": lambda data: b"\x89PNG\r\n\x1a\n" + data[:1000],
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: random.Random(SEED).randbytes(len(data)),
    "its first 100 bytes": lambda data: data[:100],
    "its first half": lambda data: data[: len(data) // 2],
    "all but its last byte": lambda data: data[:-1],
    "all but its last kilobyte": lambda data: data[:-1024],
    "its second half": lambda data: data[len(data) // 2 :],
    "a flipped bit": flipped,
    "compressed": deflated,
    "twice itself, cut": lambda data: data + data[: len(data) // 3],
    "a pickle of a number": lambda data: pickle.dumps(5),
    "a pickle that runs code": lambda data: pickle.dumps(RunsCode()),
}


def _set(*path: Any, to: Any) -> Callable[[Content], Any]:
    def change(content: Content) -> Content:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return content

    return change


def _drop(*path: Any) -> Callable[[Content], Any]:
    def change(content: Content) -> Content:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return content

    return change


def _fill(*path: Any, value: float) -> Callable[[Content], Any]:
    def change(content: Content) -> Content:
        inner: Any = content
        for key in path:
            inner = inner[key]
        inner.view(-1)[0] = value
        return content

    return change


WEIGHT = "module.backbone.blocks.0.mlp.fc1.weight"
nan, inf = float("nan"), float("inf")
CONTENTS: dict[str, Callable[[Content], Any]] = {
    "a list": lambda content: [1, 2],
    "a tensor": lambda content: torch.zeros(3),
    "nothing in it": lambda content: {},
    "code in its args": _set("args", to=RunsCode()),
    "no student": _drop("student"),
    "no teacher": _drop("teacher"),
    "no optimizer": _drop("optimizer"),
    "no center": _drop("dino_loss"),
    "no epoch": _drop("epoch"),
    "epoch is a text": _set("epoch", to="three"),
    "epoch is negative": _set("epoch", to=-1),
    "epoch is NaN": _set("epoch", to=nan),
    "epoch is a tensor": _set("epoch", to=torch.tensor(2)),
    "iteration is a text": _set("iteration", to="7"),
    "student is a list": _set("student", to=[1]),
    "student is empty": _set("student", to={}),
    "a weight is a number": _set("student", WEIGHT, to=1.0),
    "a weight is missing": _drop("student", WEIGHT),
    "a weight more": _set("student", "module.backbone.extra", to=torch.zeros(1)),
    "a weight of another shape": _set("student", WEIGHT, to=torch.zeros(5, 5)),
    "a weight of another rank": _set("teacher", "module.backbone.pos_embed", to=torch.zeros(5)),
    "NaN in the student": _fill("student", WEIGHT, value=nan),
    "infinity in the teacher": _fill("teacher", WEIGHT, value=inf),
    "NaN in the center": _fill("dino_loss", "center", value=nan),
    "a center of another shape": _set("dino_loss", "center", to=torch.zeros(1, 5)),
    "NaN in a moment": _fill("optimizer", "state", 3, "exp_avg_sq", value=nan),
    "an empty optimizer state": _set("optimizer", "state", to={}),
    "an optimizer without groups": _set("optimizer", "param_groups", to=[]),
    "an optimizer of one group": lambda content: _drop("optimizer", "param_groups", 0)(content),
    "an optimizer that is a list": _set("optimizer", to=[1, 2]),
    "a moment of another shape": _set("optimizer", "state", 3, "exp_avg", to=torch.zeros(7)),
    "a moment is missing": _drop("optimizer", "state", 3, "exp_avg"),
    "groups that are numbers": _set("optimizer", "param_groups", to=[1, 2]),
    "a number as a name": _set("student", 5, to=torch.zeros(1)),
    "terabytes in four bytes": _set("student", "extra", to=torch.zeros(1).expand(2**38)),
    "a tensor without data": _set("dino_loss", "center", to=torch.zeros(1, 64, device="meta")),
    "whole numbers as weights": _set("student", WEIGHT, to=torch.zeros(768, 192, dtype=torch.int64)),
    "a learning rate that is a text": _set("optimizer", "param_groups", 0, "lr", to="x"),
    "progress is a list": _set("progress", to=[1]),
    "a line of another epoch": _set("progress", "entry", "epoch", to=0),
    "an evaluation that is a text": _set("progress", "before", to={"knn": "high"}),
}  # fmt: skip

# Changed at a resume.
IMPOSSIBLE = {
    "use_bn_in_head": "false",
    "patch_size": 6,
    "out_dim": 32,
    "optimizer": "sgd",
    "hidden_dim": 16,
    "bottleneck_dim": 8,
}
MEANINGFUL = {
    "lr": 0.001,
    "epochs": 4,
    "seed": 1,
    "batch_size_per_gpu": 12,
    "local_crops_number": 1,
    "weight_decay": 0.1,
    "momentum_teacher": 0.9,
    "drop_path_rate": 0.0,
    "flip_prob": 0.5,
}
FINISHED = {"epochs": 2}


def refused(ended: Ended, folder: Path, before: dict[str, bytes], *words: str) -> list[str]:
    """What is wrong with how a checkpoint was refused."""
    wrong = []
    line = last_line(ended.output)
    if ended.code != 2 or "Traceback" in ended.output:
        wrong.append(f"exit code {ended.code}: {ended.output[-800:]}")
    advice = "weights_only" in line or "..." in line  # PyTorch's, to load the file unsafely, or what was cut
    if not all(word in line for word in ("checkpoint.pth", "--resume false", *words)) or advice:
        wrong.append(f"said: {line}")
    if before != {path.name: path.read_bytes() for path in folder.iterdir()}:
        wrong.append("the folder was changed")
    return wrong


def main() -> int:
    args = trial_parser(__doc__).parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        done = Path(name) / "done"
        assert run(done).code == 0
        good = (done / "checkpoint.pth").read_bytes()

        def trial(kind: str, data: bytes, *flags: str, words: tuple[str, ...] = ()) -> list[str]:
            folder = Path(name) / kind.replace(" ", "_")
            folder.mkdir()
            shutil.copy(done / "checkpoint0000.pth", folder)
            (folder / "checkpoint.pth").write_bytes(data)
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            wrong = refused(run(folder, flags), folder, before, *words)
            shutil.rmtree(folder)
            return wrong

        every = 6 if args.quick else 1
        for kind in list(BYTES)[::every]:
            words = trial(kind, BYTES[kind](good), words=("checkpoint0000.pth there holds 1 epoch",))
            table.add("a checkpoint of other bytes", kind, words)
        loaded = load_checkpoint(done / "checkpoint.pth")
        for kind in list(CONTENTS)[::every]:
            out = io.BytesIO()
            torch.save(CONTENTS[kind](copy.deepcopy(loaded)), out)
            words = trial(kind, out.getvalue(), words=("checkpoint0000.pth there holds 1 epoch",))
            table.add("a checkpoint of other contents", kind, words)
        for flag in list(IMPOSSIBLE)[::every]:
            value = str(IMPOSSIBLE[flag])
            words = trial(
                f"--{flag}",
                good,
                f"--{flag}",
                value,
                words=(f"--{flag} ", f"-> {value.title() if flag.startswith('use') else value}"),
            )
            table.add("an argument that cannot change", flag, words)
        for flag in list(MEANINGFUL)[::every]:
            folder, value = Path(name) / flag, str(MEANINGFUL[flag])
            folder.mkdir()
            shutil.copy(done / "checkpoint0000.pth", folder / "checkpoint.pth")
            shutil.copy(done / "args.json", folder)
            ended = run(folder, [f"--{flag}", value])
            words = [] if ended.code == 0 and f"--{flag} " in ended.output else [ended.output]
            words += [] if f"-> {value}" in ended.output else ["not said"]
            words += [] if flag in (folder / "args.json").read_text().partition("history")[2] else ["not in args.json"]
            table.add("an argument that may change, said", flag, words)
        for flag, value in FINISHED.items():
            folder = Path(name) / "finished"
            shutil.copytree(done, folder)
            ended = run(folder, [f"--{flag}", str(value)])
            words = [] if ended.code == 0 and "nothing is left to train" in ended.output else [ended.output]
            table.add("nothing left to train, said", f"--{flag} {value}", words)
    ran = Path("/tmp/fastdino_ran_code")
    table.add("code in a file", "not run", ["it was run"] * ran.exists())
    ran.unlink(missing_ok=True)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
