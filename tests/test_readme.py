"""Every command and every block of Python in the README runs, on a few small images and with a small model."""

import copy
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import copydays, davis, oxford

import fastdino
from bench.records import read
from bench.report import BEGIN, END, summary
from fastdino.cli import main, parser
from fastdino.data.sequences import SequenceSource
from fastdino.export.formats import FORMATS
from fastdino.train import build

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "bench" / "results" / "cpu"
SCREENS = 100  # lines: about two screens
PROGRAMS = r"(?:fastdino|torchrun|python|bench/gpu\.sh) "
SMALL = shlex.split(
    "--arch vit_nano --patch_size 8 --global_crops_size 32 --local_crops_size 16 --out_dim 64 --hidden_dim 32 "
    "--bottleneck_dim 16 --epochs 1 --batch_size_per_gpu 8 --attention_images 1 --resume false"
)

# Recipes' own heads, and stages that begin after more than one epoch.
NEWER = ["--ibot_out_dim", "64", "--global_crops_size", "48"]
GRAM = shlex.split("--epochs 2 --gram_start 1 --gram_update_epochs 1")

FEWER = {"train": SMALL, "linear": ["--epochs", "1"], "logreg": ["--C", "1"]}  # of what would take long
FEWER |= {name: ["--imsize", "64"] for name in ("retrieval", "copies", "video")}


def fences():
    """(language, text) of every block between ``` and ```."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands():
    """Of blocks, and of the text."""
    shell = "".join(text for language, text in fences() if language == "sh")
    blocks = [*shell.splitlines(), *re.findall(r"^    (.*)$", prose(README), re.MULTILINE)]
    inline = re.findall(rf"`({PROGRAMS}[^`|]*)`", README)
    return [command for command in dict.fromkeys([*blocks, *inline]) if " | " not in command]


def python_blocks():
    return [text for language, text in fences() if language == "python"]


def prose(text):
    """Without what stands between ``` and ```."""
    return re.sub(r"^```.*?(^```$|\Z)", "", text, flags=re.MULTILINE | re.DOTALL)


def sentences(text):
    """Of paragraphs and items of lists; headings, tables, pictures and commands are none."""
    lines = [line for line in prose(text).splitlines() if not re.match(r"#|\||!\[|<!--|    ", line)]
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", "\n".join(lines)):
        yield from re.split(r"(?<=[.!?])\s+", paragraph.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photo_folder, photos):
    """photos/ with two classes, a run over them, benchmarks, and the results of two runs of ours."""
    folder = tmp_path_factory.mktemp("readme")
    for number, name in enumerate(("cats", "dogs")):
        target = folder / "photos" / name
        target.mkdir(parents=True)
        for i, path in enumerate(sorted(photo_folder.glob(f"class_{number}/*.jpg"))):
            shutil.copy(path, target / f"{i:02}.jpg")
    for name in ("before", "after"):
        shutil.copytree(RESULTS, folder / name)
    oxford(folder / "revisited")
    copydays(folder / "copydays", n=4, n_strong=4, n_whitening=200)
    (folder / "copydays" / "whitening").rename(folder / "yfcc")
    davis(folder / "DAVIS", photos)
    (folder / "DAVIS" / "JPEGImages" / "480p" / "high").rename(folder / "film")
    (folder / "DAVIS" / "Annotations" / "480p" / "high" / "00000.png").rename(folder / "first_mask.png")
    (folder / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("wide\n")
    shutil.copytree(folder / "photos", folder / "held_out")
    shutil.copy(ROOT / "README.md", folder)
    words = ["--data_path", str(folder / "photos"), "--output_dir", str(folder / "runs" / "photos")]
    assert main(["train", *words, *SMALL]) == 0
    (folder / "fastdino_digits").mkdir()
    shutil.copy(folder / "runs" / "photos" / "checkpoint.pth", folder / "fastdino_digits")
    return folder


def run(words, folder, expect=(0,)):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode in expect, done.stdout + done.stderr


def imports(library):
    try:
        importlib.import_module(library)
    except ImportError:
        return False
    return True


def fewer(words):
    """Flags that make a command of ours short."""
    flags = FEWER.get(words[1], [])
    if "--recipe" in words:
        flags = [*flags, *NEWER]
    if "--gram_start" in words:
        flags = [*flags, *GRAM]
    return flags[4:] if any(word.startswith("timm:") for word in words) else flags  # not SMALL's ViT


def run_command(command, folder, forks, monkeypatch, capsys):
    """The command as it stands, but for what would take long."""
    words = shlex.split(command)
    if words[0] == "fastdino":
        monkeypatch.chdir(folder)
        monkeypatch.setattr("fastdino.commands.linear_probe.SWEEP_STEPS", 10)
        if "--help" in words:
            with pytest.raises(SystemExit) as end:
                main(words[1:])
            assert end.value.code == 0
        elif words[1] == "export" and not all(map(imports, FORMATS[words[words.index("--format") + 1]].needs)):
            assert main(words[1:]) == 2
            assert "cannot be imported" in capsys.readouterr().err
        else:
            assert main([*words[1:], *fewer(words)]) == 0, capsys.readouterr().err
    elif words[0] == "torchrun":
        words[words.index("--nproc_per_node=8")] = "--nproc_per_node=2"
        small = SMALL if "fastdino.train" in words else []
        run([sys.executable, "-m", "torch.distributed.run", *words[1:], *small], folder)
    elif words[:3] == ["python", "-m", "bench"]:
        pytest.importorskip("pytest_benchmark", reason="the benchmarks run under pytest-benchmark: the extra `bench`")
        few = [] if words[3] in ("report", "compare") else ["--out", "out", "--quick", "-k", "center_update and ours"]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        done = forks.run(*words[1:], *few, cwd=folder, env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
    elif words[0] == "bench/gpu.sh":  # what each of its parts does, other tests show
        stand_in = folder / "bin" / "python"
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text('#!/bin/sh\necho "$@"\n')
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", f"{stand_in.parent}:{os.environ['PATH']}")
        run([ROOT / words[0], folder / words[1]], folder)
        parts = (folder / words[1] / "parts.txt").read_text().splitlines()
        assert parts[0].startswith("proof: exit code 0")
        assert len(parts) == len(list((folder / words[1]).glob("*.txt"))) - 2  # preflight.txt, and parts.txt itself
    else:
        raise AssertionError(f"no test knows how to run: {command}")


def is_install(command):
    return "pip install" in command


def test_the_commands_that_install_are_those_that_ci_runs():
    """CI reads the indented ones of constraints.txt from here; it installs the extra, and the ops alone, too."""
    pattern = re.search(r"s/\^ {4}\\\((.*)\\\)/", (ROOT / ".ci" / "run").read_text())[1]
    indented = re.findall(rf"^ {{4}}({pattern})$", README, re.MULTILINE)
    assert len(indented) == 2
    assert {c for c in commands() if is_install(c)} == {
        *indented,
        'python -m pip install -c constraints.txt -e ".[bench]"',
        'python -m pip install -c constraints.txt -e ".[export]"',
        "python -m pip install ./kernels",
    }


@pytest.mark.parametrize("program", ["fastdino", "torchrun", "python", "bench/gpu.sh"])
def test_commands_run(program, folder, forks, fifth, timm, monkeypatch, capsys):
    few = [SequenceSource([source[i] for i in range(40)], source.labels[:40]) for source in fifth]
    monkeypatch.setattr(build, "load_digits", lambda: few)  # what is trained on without --data_path
    found = [command for command in commands() if command.startswith(program) and not is_install(command)]
    assert found
    for command in found:
        run_command(command, folder, forks, monkeypatch, capsys)
    for name in ("checkpoint.pth", "backbone.pth", "log.txt", "args.json", "curves.png", "attention.png"):
        assert (folder / "runs" / "photos" / name).is_file()


def test_every_block_is_commands_python_or_output():
    for language, text in fences():
        assert language in ("sh", "python", "text"), text
        is_command = [bool(re.match(PROGRAMS, line)) for line in text.splitlines()]
        assert all(is_command) if language == "sh" else not any(is_command), text
    assert {c for c in re.findall(r"^    (.*)$", prose(README), re.MULTILINE)} <= set(commands())


def test_the_first_two_screens_have_short_sentences():
    for sentence in sentences("".join(README.splitlines(keepends=True)[:SCREENS])):
        assert len(sentence.split()) <= 30, sentence


def surroundings(block):
    """What a reader has at hand: images and networks of their own."""
    torch.manual_seed(0)
    if "dataset=" in block:
        resnet = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        resnet.embed_dim = 8
        photos = [torch.rand(3, 40, 40) for _ in range(16)]
        return {"fastdino": fastdino, "photos": photos, "resnet": resnet}
    if "load_backbone" in block or "result.backbone" in block:
        return {"images": torch.randn(2, 3, 32, 32)}
    net = torch.nn.Linear(4, 3)
    return {
        "student": torch.randn(10, 2, 512),
        "teacher": torch.randn(2, 2, 512),
        "center": torch.zeros(512),
        "student_net": net,
        "teacher_net": copy.deepcopy(net),
    }


@pytest.mark.parametrize("block", python_blocks(), ids=lambda text: text.split("\n")[0])
def test_python_runs(block, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = surroundings(block)
    train = fastdino.train
    small = vars(parser("train").parse_args(["train", *SMALL])) if "fastdino.train(" in block else {}
    small = {name: value for name, value in small.items() if name not in ("command", "arch", "patch_size")}
    monkeypatch.setattr(fastdino, "train", lambda **flags: train(**{**flags, **small}))
    exec(compile(block, "README.md", "exec"), names)
    for name in ("value", "features"):
        if name in names:
            assert torch.isfinite(names[name]).all()


def test_the_table_is_that_of_the_committed_results():
    table = README[README.index(BEGIN) + len(BEGIN) : README.index(END)].strip()
    assert table == summary(read(RESULTS))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
