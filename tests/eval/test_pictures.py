"""Attention and principal components: the numbers against the network's own, the files as the original names them."""

import io

import cv2
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from fastdino import vit_nano
from fastdino.cli import main
from fastdino.data.augment import center_view, normalize
from fastdino.data.films import frames, write_film
from fastdino.errors import UserError
from fastdino.eval.attention_maps import Looked, attention_figure, cls_attention, look, mass_masks, save_maps
from fastdino.eval.pca import patch_colors, patch_tokens, pca_figure
from fastdino.eval.pictures import row_labels, save_figure


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return vit_nano(patch_size=8, img_size=[32])


@pytest.fixture(scope="module")
def weights(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "backbone.pth"
    torch.save(backbone.state_dict(), path)
    return str(path)


def test_attention_is_the_models_in_images_of_any_shape(backbone, photos):
    for view in (center_view(Image.fromarray(photos[0]), 36, 32), photos[0][:70, :101]):
        maps = cls_attention(backbone, view)
        height, width = (side // 8 for side in view.shape[:2])
        pixels = torch.from_numpy(view[: height * 8, : width * 8].copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = backbone.eval().get_last_selfattention(normalize(pixels))[0, :, 0, 1:]
        assert maps.shape == (3, height, width)
        assert np.allclose(maps.reshape(3, -1), expected.numpy(), atol=1e-6)


def test_what_is_drawn_of_an_image_is_what_was_looked_at(backbone, photos):
    looked = look(backbone, "a", photos[0][:70, :101])
    assert looked.view.shape == (64, 96, 3)
    assert looked.maps.shape == (3, 8, 12)


def test_patches_in_colour_are_of_all_that_is_shown_above_them(weights, photos, tmp_path, monkeypatch):
    """A patch of 8 pixels leaves the rest of 70 and of 101 out."""
    Image.fromarray(photos[0]).save(tmp_path / "a.png")
    drawn = []
    monkeypatch.setattr("fastdino.commands.pca.pca_figure", lambda *words: drawn.append(words) or pca_figure(*words))
    words = ["--pretrained_weights", weights, "--images", tmp_path / "a.png", "--output", tmp_path / "pca.png"]
    assert main(["pca", *map(str, words), "--image_size", "70", "101"]) == 0
    [(_, views, colors)] = drawn
    assert [view.shape for view in views] == [(64, 96, 3)]
    assert [color.shape for color in colors] == [(8, 12, 3)]


def test_rows_are_told_apart():
    assert row_labels(["photos/cats/01.jpg", "photos/dogs/02.jpg"]) == ["01.jpg", "02.jpg"]
    assert row_labels(["photos/cats/01.jpg", "photos/dogs/01.jpg", "b.png"]) == ["cats/01.jpg", "dogs/01.jpg", "b.png"]


def test_long_labels_are_shortened_to_their_picture(photos):
    long = "kitchen_with_a_very_long_name/WWWW_2024-01-01_12-00-00_edited.png"
    views = [photos[0][:96, :64], photos[0][:64, :96], photos[0][:96, :64]]
    names, maps = [long, "a.png", long], np.ones((3, 12, 8), np.float32)
    drawn = [pca_figure(names, views, [np.ones((12, 8, 3))] * 3)]
    drawn.append(attention_figure([Looked(name, view, maps) for name, view in zip(names, views)]))
    for figure in drawn:
        figure.draw_without_rendering()
        titled = [ax for ax in figure.axes if ax.get_title("left")]
        assert [ax.get_title("left") == name for ax, name in zip(titled, names)] == [False, True, False]
        for ax in titled:
            label, box = ax.get_title("left"), ax.get_window_extent()
            assert label == "a.png" or (label.startswith("kitchen") and label.endswith("ited.png"))
            assert ax._left_title.get_window_extent().x1 < box.x1 + 2


def test_masks_hold_their_share_of_the_mass_and_no_patch_more():
    maps = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32) ** 3
    for share in (0.1, 0.6, 0.95):
        for grid, mask in zip(maps, mass_masks(maps, share)):
            total = grid.sum()
            assert grid[mask].sum() >= share * total * (1 - 1e-6)
            assert grid[mask].sum() - grid[mask].min() <= share * total * (1 + 1e-6)
            assert grid[mask].min() > grid[~mask].max()


def test_files_of_heads_are_those_of_the_original(backbone, photos, tmp_path):
    view = photos[1][:66, :90]
    looked = Looked("a", view, cls_attention(backbone, view))
    paths = save_maps(looked, tmp_path, 8, 0.6)
    heads = range(3)
    expected = ["img.png", *(f"attn-head{h}.png" for h in heads), *(f"mask_th0.6_head{h}.png" for h in heads)]
    assert [path.name for path in paths] == expected
    file = io.BytesIO()
    pyplot.imsave(file, looked.maps[1].repeat(8, 0).repeat(8, 1), format="png")
    theirs, ours = (np.asarray(Image.open(f).convert("RGB")).astype(int) for f in (file, tmp_path / "attn-head1.png"))
    assert ours.shape == (64, 88, 3)
    assert abs(theirs - ours).max() <= 3  # one step of the colour map, at its edges
    mask = np.asarray(Image.open(tmp_path / "mask_th0.6_head2.png"))
    kept = mass_masks(looked.maps, 0.6)[2].repeat(8, 0).repeat(8, 1)
    assert np.array_equal(mask[kept], view[:64, :88][kept])
    assert mask[~kept].mean() < view[:64, :88][~kept].mean() / 2


def test_a_picture_has_a_row_for_each_image(backbone, photos, tmp_path):
    looked = [Looked("a", photos[0], cls_attention(backbone, photos[0][:64, :96])) for _ in range(2)]
    save_figure(tmp_path / "one.png", attention_figure(looked))
    save_figure(tmp_path / "two.png", attention_figure(looked[:1]))
    one, two = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB")) for n in ("one", "two"))
    assert one.std() > 20
    assert one.shape[0] > 1.6 * two.shape[0]


def test_colors_tell_foreground_and_parts_apart_in_all_images():
    """Two images with an object of two parts on a ground of another kind, each the other way round."""
    rng = np.random.default_rng(0)
    ground, left, right = rng.normal(size=(3, 16)) * 4
    tokens, parts = [], []
    for flip in (1, -1):
        part = np.zeros((8, 10), int)
        part[2:6, 2:5], part[2:6, 5:8] = 1, 2
        part = part[:, ::flip]
        parts.append(part)
        tokens.append((np.stack([ground, left, right])[part] + rng.normal(size=(8, 10, 16)) * 0.1).astype(np.float32))
    colors = patch_colors(tokens)
    for color, part in zip(colors, parts):
        assert color.shape == (8, 10, 3)
        assert not color[part == 0].any()
        assert color[part > 0].any(1).all()
    means = [[color[part == n].mean(0) for n in (1, 2)] for color, part in zip(colors, parts)]
    assert np.allclose(means[0], means[1], atol=0.2)
    assert abs(means[0][0] - means[0][1]).max() > 0.5
    flipped = patch_colors(tokens, flip=True)
    assert flipped[0][parts[0] == 0].any(1).all()
    assert not flipped[0][parts[0] > 0].any()
    with pytest.raises(UserError, match="--threshold: only 0 patches are above 99"):
        patch_colors(tokens, threshold=99)


def test_patch_tokens_are_the_networks(backbone, photos):
    tokens = patch_tokens(backbone, photos[0][:45, :70])
    pixels = torch.from_numpy(photos[0][:40, :64].copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        [expected] = backbone.eval().get_intermediate_layers(normalize(pixels))
    assert np.allclose(tokens.reshape(-1, 96), expected[0, 1:], atol=1e-5)


@pytest.fixture
def film(photos, tmp_path):
    """Twelve frames in a folder; the third is broken."""
    folder = tmp_path / "film"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(photos[0][:60, 8 * i : 8 * i + 90]).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes(b"no")
    return folder


def test_frames_come_in_the_order_of_their_numbers_and_bad_ones_are_named(film):
    bad: list[str] = []
    assert [name for name, _ in frames(film, bad)] == [str(i) for i in range(12) if i != 2]
    assert bad[0].startswith(f"{film / '2.png'}: is no JPEG")


def test_a_film_is_written_and_read(tmp_path):
    pictures = [np.full((33, 48, 3), 20 * i, np.uint8) for i in range(10)]
    for name in ("a.mp4", "a.avi"):
        assert write_film(tmp_path / name, pictures, 25) == 10
        read = [np.asarray(image) for _, image in frames(tmp_path / name)]
        assert [r.shape for r in read] == [(32, 48, 3)] * 10
        assert np.allclose([r.mean() for r in read], [20 * i for i in range(10)], atol=4)


def test_a_film_that_is_not_finished_leaves_the_old_one(tmp_path):
    def broken():
        yield np.zeros((32, 32, 3), np.uint8)
        raise KeyboardInterrupt

    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_film(tmp_path / "a.mp4", broken(), 25)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_the_attention_of_a_film_is_beside_it(weights, film, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    words = ["--video", film, "--image_size", 48, "--output", out, "--output_dir", tmp_path / "frames"]
    assert main(["attention", "--pretrained_weights", weights, *map(str, words), "--fps", "5"]) == 0
    assert "without 1 unreadable images" in capsys.readouterr().out
    assert len(list((tmp_path / "frames").iterdir())) == 11
    read = cv2.VideoCapture(str(out))
    assert read.get(cv2.CAP_PROP_FPS) == 5
    frame = np.asarray(Image.open(tmp_path / "frames/5.png"))
    assert frame.shape == (48, 2 * 72, 3)
    resized = Image.open(film / "5.png").resize((72, 48), Image.Resampling.BILINEAR)
    assert np.array_equal(frame[:, :72], np.asarray(resized))


def test_pictures_of_the_command_line(weights, photo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [str(p) for p in sorted(photo_folder.rglob("*.jpg"))[:2]]
    common = ["--pretrained_weights", weights, "--images", *images]
    assert main(["attention", *common, "--threshold", "0.6", "--output_dir", "maps"]) == 0
    assert len(list((tmp_path / "maps/1-04").iterdir())) == 7
    assert main(["pca", *common, "--output_dir", "colors", "--output", "colors.svg"]) == 0
    assert {p.name for p in (tmp_path / "colors").iterdir()} == {"0-00.png", "1-04.png"}
    assert (tmp_path / "colors.svg").read_text().startswith("<?xml")
    assert "wrote colors.svg" in capsys.readouterr().out


MISTAKES = {
    "no film": ("attention --video nowhere", "expected a film or a folder of frames, found nothing at nowhere"),
    "no frames": ("attention --video empty", "no frame in empty that can be read"),
    "not a film": ("attention --video text.mp4", "no frame in text.mp4: it is no film that OpenCV reads"),
    "film as picture": ("attention --video empty --output a.png", "--output: expected a file .mp4, .avi in a folder"),
    "threshold": ("attention --threshold 60", "--threshold: expected a share between 0 and 1, got 60.0"),
    "masks nowhere": (
        "attention --threshold 0.6",
        "--threshold: masks are pictures of their own, and need an --output",
    ),
    "image size": (
        "pca --image_size 7",
        "--image_size: expected one or two numbers of at least the patch size 8",
    ),
    "broken": ("pca --images text.mp4", "--images: text.mp4: is no JPEG"),
    "folder": ("attention --output_dir text.mp4", "--output_dir: text.mp4: File exists"),
    "threshold of pca": ("pca --threshold nan", "--threshold: expected a finite number, got nan"),
}


@pytest.mark.parametrize(("line", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_end_with_one_line(weights, tmp_path, monkeypatch, capfd, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no film")
    command, *flags = line.split()
    assert main([command, "--pretrained_weights", weights, *flags]) == 2
    said = capfd.readouterr().err
    assert message in said
