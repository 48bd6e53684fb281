"""fastdino retrieval, copies and video: what they print and write, and one line for every mistake."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from made_up import copydays, davis, oxford
from PIL import Image
from test_cli import RunsCode

from fastdino import vit_nano
from fastdino.cli import main
from fastdino.eval.video import frame_scores


@pytest.fixture(scope="module")
def made(tmp_path_factory, photos):
    """The three data sets, small, and weights."""
    folder = tmp_path_factory.mktemp("made")
    oxford(folder / "revisited")
    copydays(folder / "copydays", n=6, n_strong=8, n_whitening=200)
    davis(folder / "davis", photos)
    torch.manual_seed(0)
    torch.save(vit_nano(patch_size=8, img_size=[32]).state_dict(), folder / "weights.pth")
    shutil.copytree(folder / "davis/JPEGImages/480p/high", folder / "film")
    shutil.copy(folder / "davis/Annotations/480p/high/00000.png", folder / "mask.png")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy of them that a test may damage, and the working folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command, *flags):
    return main([command, "--pretrained_weights", "weights.pth", *map(str, flags)])


RETRIEVAL = "retrieval --data_path revisited --imsize 32"
COPIES = "copies --data_path copydays --imsize 16"
VIDEO = "video --data_path davis --imsize 64 --output_dir out"
FILM = "video --frames film --mask mask.png --imsize 64"


def truth(**changes):
    held = {"imlist": ["a"], "qimlist": ["a"], "gnd": [{"easy": [0], "hard": [0], "junk": []}]} | changes
    return lambda w: (w / "revisited/roxford5k/gnd_roxford5k.pkl").write_bytes(pickle.dumps(held))


def remove(path):
    return lambda w: shutil.rmtree(w / path) if (w / path).is_dir() else (w / path).unlink()


def write(path):
    return lambda w: (w / path).write_bytes(b"broken")


def picture(path, **how):
    return lambda w: Image.new(**({"mode": "L", "size": (150, 170)} | how)).save(w / path)


MISTAKES = {
    "no backbone": (RETRIEVAL, lambda w: torch.save({"teacher": {}}, w / "weights.pth"), "has no Vision Transformer"),
    "no checkpoint": (VIDEO, remove("weights.pth"), "no checkpoint at weights.pth"),
    "no gnd": (RETRIEVAL, remove("revisited/roxford5k/gnd_roxford5k.pkl"), "gnd_roxford5k.pkl: No such file"),
    "no jpg": (RETRIEVAL, remove("revisited/roxford5k/jpg"), "expected a folder of images at revisited/roxford5k/jpg"),
    "other name": (f"{RETRIEVAL} --dataset rparis6k", None, "revisited/rparis6k/gnd_rparis6k.pkl: No such file"),
    "code in gnd": (RETRIEVAL, truth(gnd=RunsCode()), "holds pickled code, which is refused and not run: posix.system"),
    "image missing": (RETRIEVAL, truth(), "the benchmark names revisited/roxford5k/jpg/a.jpg, which is not there"),
    "no size": (f"{RETRIEVAL} --imsize 0", None, "--imsize: expected a value above 0, got 0"),
    "below a patch": (f"{RETRIEVAL} --imsize 7", None, "none of 40 images can be read"),
    "no originals": (
        COPIES,
        remove("copydays/original"),
        "expected the folders original/ and one of strong, jpegqual/3",
    ),
    "one copy less": (
        COPIES,
        remove("copydays/crops/10/200300.jpg"),
        "crops/10: expected 6 images, a copy of each original, got 5",
    ),
    "empty block": (
        COPIES,
        lambda w: [p.unlink() for p in (w / "copydays/crops/10").iterdir()],
        "no image below copyd",
    ),
    "few to whiten": (
        f"{COPIES} --whitening_path film",
        None,
        "expected at least 192 images, as many as features have",
    ),
    "few readable": (
        f"{COPIES} --whitening_path copydays/whitening",
        lambda w: [p.write_bytes(b"") for p in sorted((w / "copydays/whitening").iterdir())[:9]],
        "whitening: expected at least 192 images, as many as features have numbers, got 191",
    ),
    "no distractors": (f"{COPIES} --distractors_path nowhere", None, "found nothing at nowhere"),
    "smaller than a patch": (f"{COPIES} --imsize 7", None, "--imsize: expected at least the patch size 8, got 7"),
    "no film list": (VIDEO, remove("davis/ImageSets"), "expected names of films in davis/ImageSets/2017/val.txt"),
    "film elsewhere": (
        VIDEO,
        lambda w: (w / "davis/ImageSets/2017/val.txt").write_text("../film"),
        "davis/ImageSets/2017/val.txt: expected names of folders, got ../film",
    ),
    "no frames": (VIDEO, remove("davis/JPEGImages/480p/high"), "found nothing at davis/JPEGImages/480p/high"),
    "empty film": (FILM, lambda w: [p.unlink() for p in (w / "film").iterdir()], "no frame in film (looked for jpg"),
    "no mask": (
        VIDEO,
        remove("davis/Annotations/480p/high/00000.png"),
        "high/00000.png: expected a PNG, a mask of the",
    ),
    "broken mask": (FILM, write("mask.png"), "mask.png: expected a PNG, a mask of the first frame: cannot identify"),
    "small mask": (
        FILM,
        picture("mask.png", size=(9, 8), color=1),
        "mask.png: expected a mask as large as the first frame, 150 x 170 pixels, got 9 x 8",
    ),
    "mask in colors": (FILM, picture("mask.png", mode="RGB"), "expected a mask of one channel, whose levels are the"),
    "empty mask": (FILM, picture("mask.png"), "mask.png shows no object: all of it is 0"),
    "broken first frame": (FILM, write("film/00000.jpg"), "the first frame cannot be read: film/00000.jpg: is no JPEG"),
    "one name twice": (FILM, picture("film/00003.png"), "film: two frames with one name, 00003."),
    "output is a file": (f"{VIDEO}/../mask.png", None, "--output_dir: expected a folder, got the file"),
    "film's output is a file": (FILM, write("film_masks"), "--output_dir: expected a folder, got the file film_masks"),
    "over the frames": (f"{VIDEO}/../davis/JPEGImages/480p", None, "masks would be written over what is in"),
    "over the truth": (f"{VIDEO}/../davis/Annotations/480p", None, "masks would be written over what is in"),
    "two films": (f"{FILM} --data_path davis", None, "expected --data_path FOLDER, or --frames FOLDER and --mask FILE"),
    "no film": ("video", None, "expected --data_path FOLDER, or --frames FOLDER and --mask FILE"),
    "patches": (f"{FILM} --topk 0", None, "--topk: expected a value above 0, got 0"),
    "frames before": (f"{FILM} --n_last_frames -1", None, "--n_last_frames: expected 0 or more, got -1"),
    "tiny frames": (f"{FILM} --imsize 7", None, "frames are shown as 7 x 0 pixels, which hold no patch"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_one_line_and_exit_code_2_and_nothing_is_written(name, world, capsys):
    words, damage, expected = MISTAKES[name]
    (world / "out").mkdir()
    if damage:
        damage(world)
    before = sorted(world.rglob("*"))
    assert run(*words.split()) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(world.rglob("*")) == before


FOLDERS = ("out", "davis/Annotations/480p")


def last(capsys):
    *lines, result = capsys.readouterr().out.splitlines()
    return lines, json.loads(result)


def test_flags_of_the_original_that_say_nothing_here_are_taken(world, capsys):
    ignored = ["--use_cuda", "false", "--dist_url", "env://", "--local_rank", "0", "--arch", "vit_nano"]
    assert run(*RETRIEVAL.split(), *ignored) == 0
    assert run(*COPIES.split(), *ignored) == 0
    assert run(*FILM.split(), "--arch", "vit_nano", "--patch_size", "8", "--json", "all.json") == 0
    lines, result = last(capsys)
    assert json.loads((world / "all.json").read_text()) == result
    assert lines[-1] == "wrote the masks below ."


def test_images_that_cannot_be_read_are_counted_and_named(world, capsys):
    names = pickle.loads((world / "revisited/roxford5k/gnd_roxford5k.pkl").read_bytes())["qimlist"]
    (world / f"revisited/roxford5k/jpg/{names[0]}.jpg").write_bytes(b"broken")
    assert run(*RETRIEVAL.split()) == 0
    lines, result = last(capsys)
    assert result["unreadable"] == 2  # it is a query, too
    assert result["queries"] == 7
    assert f"database without 1 unreadable of 40 images: revisited/roxford5k/jpg/{names[0]}.jpg: is no" in lines[1]
    assert lines[2].startswith("queries  without 1 unreadable of 8 images: ")

    (world / "copydays/original/200200.jpg").write_bytes(b"broken")
    assert run(*COPIES.split()) == 0
    lines, result = last(capsys)
    assert lines[0] == "original    6 images"
    assert lines[1].startswith("original    without 1 unreadable of 6 images: copydays/original/200200.jpg: is no JPEG")
    assert result["unreadable"] == 1
    assert result["original_map"] == 1
    assert result["jpegqual/75_map"] == pytest.approx(5 / 6)  # whose original is lost is not found

    (world / "film/00004.jpg").write_bytes(b"broken")
    assert run(*FILM.split()) == 0
    lines, result = last(capsys)
    assert lines[2].startswith("film: without 1 unreadable of 12 images: film/00004.jpg: is no JPEG")
    assert result["unreadable"] == 1
    assert len(list((world / "film_masks").iterdir())) == 11


def test_blocks_that_are_not_there_are_said(world, capsys):
    shutil.rmtree(world / "copydays/strong")
    assert run(*COPIES.split()) == 0
    lines, result = last(capsys)
    assert lines[0] == "without strong, which are not there"
    assert "strong_map" not in result


def test_masks_have_the_frames_names_the_masks_colors_and_scores_where_there_is_truth(world, capsys):
    first = Image.fromarray(np.asarray(Image.open("davis/Annotations/480p/wide/00000.png")))
    colors = [0, 0, 0, 10, 20, 30, 200, 100, 50]
    first.putpalette(colors)
    first.save("davis/Annotations/480p/wide/00000.png")
    assert run(*VIDEO.split()) == 0
    lines, result = last(capsys)
    assert lines[0] == "[0/2] Begin to segmentate video wide."
    assert result["scored"] == result["films"] == 2
    assert 0.2 < result["J-Mean"] < 1
    scores = []
    for film, objects in (("wide", [1, 2]), ("high", [1])):
        frames = [  # not the first, and as DAVIS has it not the last
            frame_scores(*(np.asarray(Image.open(f"{folder}/{film}/{i:05}.png")) for folder in FOLDERS), objects)
            for i in range(1, 11)
        ]
        scores += [np.array(frames)[:, i] for i in range(len(objects))]
    assert result["J-Mean"] == pytest.approx(np.mean([of_object.mean(0)[0] for of_object in scores]))
    assert result["F-Recall"] == pytest.approx(np.mean([(of_object[:, 1] > 0.5).mean() for of_object in scores]))
    assert result["J&F-Mean"] == pytest.approx((result["J-Mean"] + result["F-Mean"]) / 2)
    masks = sorted((world / "out/wide").iterdir())
    assert [path.name for path in masks] == [f"{i:05}.png" for i in range(12)]
    for path in masks:
        image = Image.open(path)
        assert image.mode == "P"
        assert image.getpalette()[:9] == colors
    assert np.array_equal(np.asarray(Image.open(masks[0])), np.asarray(first))

    (world / "davis/Annotations/480p/wide/00005.png").unlink()
    assert run(*VIDEO.split()) == 0
    assert last(capsys)[1]["scored"] == 1


def test_a_film_of_ones_own_is_in_the_order_of_its_numbers(world, capsys):
    for path in (world / "film").iterdir():
        path.rename(path.with_name(f"frame {int(path.stem)}.jpg"))
    assert run(*FILM.split()) == 0
    assert "film: 12 frames, 1 object, " in capsys.readouterr().out
    unpadded = [np.asarray(Image.open(f"film_masks/frame {i}.png")) for i in range(12)]
    assert run(*VIDEO.split()) == 0
    for i, mask in enumerate(unpadded):
        assert np.array_equal(mask, np.asarray(Image.open(f"out/high/{i:05}.png")))
