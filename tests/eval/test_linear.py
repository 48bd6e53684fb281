"""Linear classifiers against plain PyTorch, one by one; the command's files, its resume, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DistributedSampler

from fastdino import vit_nano
from fastdino.cli import main
from fastdino.commands import linear as command
from fastdino.commands import linear_probe
from fastdino.data.augment import apply_crop, center_view, normalize
from fastdino.data.decode import decode, decode_array, open_image
from fastdino.data.params import ViewRecipe, crop_params, draw_crops
from fastdino.data.sources import FolderSource
from fastdino.data.views import RandomView, views
from fastdino.errors import UserError
from fastdino.eval.evaluations import EVALUATIONS, EvalSettings
from fastdino.eval.knn import Features
from fastdino.eval.linear import (
    Heads,
    Input,
    Labelled,
    Tokens,
    best_of_rates,
    hold_out,
    passes,
    score,
    sweep_inputs,
    train,
)

WIDTH, N_CLASSES = 6, 7


def originals_input(layers, n, avgpool):
    """As eval_linear.py joins what get_intermediate_layers gives; with more than one block it fails: as DINOv2 then."""
    output = torch.cat([x[:, 0] for x in layers[-n:]], dim=-1)
    mean = layers[-1][:, 1:].mean(1)
    if avgpool and n == 1:
        output = torch.cat((output.unsqueeze(-1), mean.unsqueeze(-1)), dim=-1)
    elif avgpool:
        output = torch.cat((output, mean), dim=-1)
    return output.reshape(len(output), -1)


@pytest.mark.parametrize("depth", [2, 4, 12])
def test_heads_train_as_classifiers_of_their_own_in_fp64(depth):
    torch.manual_seed(0)
    inputs, rates = sweep_inputs(vit_nano(depth=depth)), (0.001, 0.05, 0.7)
    n_layers = min(4, depth)
    heads = Heads(dict.fromkeys(inputs, rates), width=WIDTH, layers=n_layers, n_classes=N_CLASSES).double()
    optimizer = heads.optimizer()
    scheduler = CosineAnnealingLR(optimizer, 40)
    initial = [part.clone() for part in heads.parameters()]
    steps = [(torch.randn(n_layers, 5, 4, WIDTH).double(), torch.randint(N_CLASSES, (5,))) for _ in range(40)]

    def rows(layers):
        return torch.cat([*(x[:, 0] for x in layers), layers[-1][:, 1:].mean(1)], dim=1)

    losses = train(heads, optimizer, ((rows(x), y) for x, y in steps), scheduler)
    assert len(losses) == 3 * len(inputs)
    for i, (n, avgpool) in enumerate(inputs):
        for h, rate in enumerate(rates):
            weight, bias = (initial[2 * i + k].unflatten(0, (3, N_CLASSES))[h].detach() for k in (0, 1))
            alone = nn.Linear(weight.shape[1], N_CLASSES).double()
            alone.load_state_dict({"weight": weight, "bias": bias})
            sgd = torch.optim.SGD(alone.parameters(), rate, momentum=0.9)
            cosine, total = CosineAnnealingLR(sgd, 40), 0.0
            for x, y in steps:
                loss = nn.functional.cross_entropy(alone(originals_input(x, n, avgpool)), y)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                cosine.step()
                total += loss.item()
            trained = list(heads.parameters())[2 * i].unflatten(0, (3, N_CLASSES))[h]
            assert torch.allclose(trained, alone.weight, rtol=1e-11, atol=1e-13)
            assert (trained - weight).abs().max() > 1e-3
            assert losses[3 * i + h].item() == pytest.approx(total / 40, rel=1e-11)


def test_scores_are_those_of_each_head():
    torch.manual_seed(1)
    heads = Heads({Input(1, False): (0.1, 0.2)}, width=WIDTH, layers=1, n_classes=N_CLASSES)
    data = Labelled(torch.randn(50, WIDTH), torch.randint(N_CLASSES, (50,)))
    found = score(heads, data, batch_size=16)
    for h in range(2):
        ((_, _, logits),) = heads(data.features)
        logits = logits[:, h].detach()
        first = logits.argsort(dim=1, descending=True)
        assert found.top1[h] == (first[:, 0] == data.labels).double().mean()
        assert found.top5[h] == (first[:, :5] == data.labels[:, None]).any(1).double().mean()
        of_batches = [nn.functional.cross_entropy(*pair) for pair in zip(logits.split(16), data.labels.split(16))]
        assert found.loss[h].item() == pytest.approx(float(sum(of_batches) / 4), rel=1e-6)


def test_the_order_is_that_of_the_originals_sampler():
    sampler = DistributedSampler(range(10), num_replicas=1, rank=0)
    found = list(passes(10, 4, 0, 2, 7))  # a pass has 3 steps: the last of the first, a second one, a third one
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert [number for number, _ in found] == [0, 1, 2]
    assert [order.tolist() for _, order in found] == [expected[0][8:], expected[1], expected[2]]


def test_random_crops_are_the_training_loaders_and_depend_on_seed_epoch_and_index_alone(photo_folder):
    source = FolderSource(photo_folder)
    recipe = ViewRecipe(size=24, scale=(0.08, 1.0), jitter=0, gray=0, blur=0)
    indices = np.arange(31, -1, -1)
    pixels = [decode_array(open_image(source[int(i)])) for i in indices]
    heights, widths = zip(*(image.shape[:2] for image in pixels))
    drawn = crop_params(draw_crops(5, 3, indices, widths, heights, [recipe]))
    assert {params.flip for params in drawn} == {True, False}
    for batch_size, workers in ((32, 0), (5, 3)):
        shown = views(source, indices, RandomView(24, 5, 3), batch_size, workers, lambda *_: None)
        made = torch.cat([batch for batch, _ in shown]).permute(0, 2, 3, 1).numpy()
        for crop, image, params in zip(made, pixels, drawn):
            assert np.array_equal(crop, apply_crop(image, params, 24, Image.Resampling.BILINEAR))
    assert np.mean([params.box[2] * params.box[3] for params in drawn]) == pytest.approx(0.5 * 120 * 100, rel=0.2)


def test_a_linear_classifier_is_about_as_good_as_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (900,), generator=generator)
    features = torch.randn(900, 32, generator=generator) + 0.9 * torch.eye(5, 32)[labels] * 2
    parts = [Labelled(features[a:b], labels[a:b]) for a, b in ((0, 600), (600, 900))]
    theirs = LogisticRegression(C=0.1).fit(features[:600], labels[:600]).score(features[600:], labels[600:])
    assert 0.6 < theirs < 0.95
    assert best_of_rates(*parts, 5, 300) == pytest.approx(theirs, abs=0.03)
    as_features = [Features(nn.functional.normalize(part.features, dim=1), part.labels) for part in parts]
    settings = EvalSettings(resize=1, size=1, limit=0, num_workers=0, k=20)
    assert EVALUATIONS["linear"](*as_features, settings)["linear"] == pytest.approx(theirs, abs=0.05)
    assert EVALUATIONS["linear"](as_features[0], None, settings)["linear"] == pytest.approx(theirs, abs=0.1)


def test_a_fifth_of_each_class_is_held_out():
    labels = np.array([0] * 10 + [1] * 2 + [2] + [3] * 4)
    kept, held = hold_out(labels)
    assert np.bincount(labels[held], minlength=4).tolist() == [2, 1, 0, 1]
    assert sorted([*kept, *held]) == list(range(17))
    with pytest.raises(UserError, match="none of 3 images can be held out"):
        hold_out(np.arange(3))


# The command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(vit_nano(patch_size=8, img_size=[16]).state_dict(), path)
    return path


@pytest.fixture
def photos_and_val(photo_folder, tmp_path):
    """train/ and val/ with four classes, of 6 and 2 images."""
    for path in sorted(photo_folder.rglob("*.jpg")):
        half = "val" if int(path.stem) >= 24 else "train"
        target = tmp_path / "data" / half / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return tmp_path / "data"


def linear(weights, data, out, *flags):
    words = ["--pretrained_weights", weights, "--data_path", data, "--output_dir", out]
    return main(["linear", *map(str, words), "--batch_size_per_gpu", "7", *map(str, flags)])


def result(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def log(out):
    return [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]


def all_features(source, backbone, n, avgpool):
    views = [torch.from_numpy(center_view(decode(source[i]), 18, 16).copy()) for i in range(len(source))]
    with torch.no_grad():
        layers = backbone.get_intermediate_layers(normalize(torch.stack(views).permute(0, 3, 1, 2)), n)
    return originals_input(layers, n, avgpool), torch.from_numpy(source.labels)


@pytest.mark.parametrize(("n", "avgpool"), [(4, False), (1, True)], ids=["n4", "n1-avg"])
def test_the_command_trains_what_plain_pytorch_does_on_center_crops(weights, photos_and_val, tmp_path, n, avgpool):
    flags = ["--train_view", "center", "--epochs", 5, "--lr", 0.5, "--n_last_blocks", n, "--val_freq", 2]
    assert linear(weights, photos_and_val, tmp_path / "out", *flags, "--avgpool_patchtokens", avgpool) == 0
    backbone = vit_nano(patch_size=8, img_size=[16]).eval()
    backbone.load_state_dict(torch.load(weights))
    halves = [all_features(FolderSource(photos_and_val / half), backbone, n, avgpool) for half in ("train", "val")]
    (x, y), (x_val, y_val) = halves
    classifier = nn.Linear(x.shape[1], 4)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(classifier.bias)
    sgd = torch.optim.SGD(classifier.parameters(), 0.5 * 7 / 256, momentum=0.9)
    cosine, sampler, expected = CosineAnnealingLR(sgd, 5), DistributedSampler(x, num_replicas=1, rank=0), []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        losses, entry = [], {"train_lr": sgd.param_groups[0]["lr"], "epoch": epoch}
        for chosen in torch.tensor(list(sampler)).split(7):
            loss = nn.functional.cross_entropy(classifier(x[chosen]), y[chosen])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        cosine.step()
        entry["train_loss"] = np.mean(losses)
        if epoch % 2 == 0:
            entry["test_acc1"] = 100 * (classifier(x_val).argmax(1) == y_val).double().mean().item()
        expected.append(entry)
    found = log(tmp_path / "out")
    assert len(found) == 5
    for entry, theirs in zip(found, expected):
        assert {name: entry.get(name) for name in theirs} == pytest.approx(theirs, rel=1e-4)
        assert ("test_loss" in entry) == ("test_acc1" in theirs)
    saved = torch.load(tmp_path / "out" / "checkpoint.pth.tar")
    assert torch.allclose(saved["state_dict"]["module.linear.weight"], classifier.weight, atol=1e-5)
    assert (classifier.weight - saved["state_dict"]["module.linear.weight"] * 0.99).abs().max() > 1e-4
    assert saved["epoch"] == 5
    assert saved["best_acc"] == max(entry.get("test_acc1", 0) for entry in found)
    # The original's objects take them.
    ddp = nn.ModuleDict({"module": nn.ModuleDict({"linear": classifier})})
    ddp.load_state_dict(saved["state_dict"])
    sgd.load_state_dict(saved["optimizer"])
    cosine.load_state_dict(saved["scheduler"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("flags", [["--train_view", "random"], ["--train_view", "center"], ["--sweep"]], ids=str)
def test_a_killed_run_goes_on_to_the_same_numbers(weights, photos_and_val, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.setattr(linear_probe, "SWEEP_STEPS", 5)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = [*flags, "--epochs", 4]
    assert linear(weights, photos_and_val, whole, *flags) == 0
    uninterrupted = result(capsys)
    seen = []

    def train_and_die(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise Killed
        return train(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(command, "train", train_and_die)
        with pytest.raises(Killed):
            linear(weights, photos_and_val, killed, *flags)
    assert torch.load(killed / "checkpoint.pth.tar")["epoch"] == 2
    (killed / "log.txt").write_text("")  # as after a kill between the two files
    capsys.readouterr()
    assert linear(weights, photos_and_val, killed, *flags) == 0
    resumed = result(capsys)
    assert {**resumed, "seconds": 0} == {**uninterrupted, "seconds": 0}
    assert (killed / "log.txt").read_text() == (whole / "log.txt").read_text()
    one, other = (torch.load(folder / "checkpoint.pth.tar") for folder in (whole, killed))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    assert linear(weights, photos_and_val, killed, *flags) == 0  # done: nothing is trained
    assert result(capsys)["linear_top1"] == resumed["linear_top1"]
    assert len(log(killed)) == 4


def test_evaluate_tests_the_classifier_that_was_trained(weights, photos_and_val, tmp_path, capsys):
    assert linear(weights, photos_and_val, tmp_path / "out", "--epochs", 3) == 0
    trained = result(capsys)
    shutil.rmtree(photos_and_val / "train")  # not needed for it
    assert linear(weights, photos_and_val, tmp_path / "out", "--evaluate") == 0
    said = capsys.readouterr().out
    tested = json.loads(said.splitlines()[-1])
    assert tested["linear_top1"] == trained["linear_top1"]
    assert f"Accuracy of the network on the 8 test images: {100 * trained['linear_top1']:.1f}%\n" in said


def test_the_sweep_names_the_best_of_52_heads(weights, photos_and_val, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear_probe, "SWEEP_STEPS", 20)
    assert linear(weights, photos_and_val, tmp_path / "out", "--sweep", "--train_view", "center", "--epochs", 2) == 0
    found = result(capsys)
    assert len(found["heads"]) == 52
    assert found["heads"][found["head"]] == found["linear_top1"] == max(found["heads"].values())
    assert {name.partition("_lr")[0] for name in found["heads"]} == {"n1", "n1_avg", "n4", "n4_avg"}


def test_class_folders_alone_give_a_fifth_to_the_test(weights, photo_folder, tmp_path, capsys):
    assert linear(weights, photo_folder, tmp_path / "out", "--epochs", 1) == 0
    said = capsys.readouterr().out
    assert "val     4 of 32 images in " in said
    assert "Data loaded with 28 train and 4 val imgs." in said


def test_a_class_with_a_single_image_is_trained_on(weights, photo_folder, tmp_path, capsys):
    shutil.copytree(photo_folder, tmp_path / "data")
    (tmp_path / "data" / "single").mkdir()
    shutil.copy(photo_folder / "class_0" / "00.jpg", tmp_path / "data" / "single")
    assert linear(weights, tmp_path / "data", tmp_path / "out", "--epochs", 1) == 0
    assert "Data loaded with 29 train and 4 val imgs." in capsys.readouterr().out


@pytest.mark.parametrize("view", ["random", "center"])
def test_unreadable_images_are_named_and_counted(weights, photos_and_val, tmp_path, capsys, view):
    broken = [sorted((photos_and_val / half).rglob("*.jpg"))[1] for half in ("train", "val")]
    for path in broken:
        path.write_bytes(b"broken")
    assert linear(weights, photos_and_val, tmp_path / "out", "--epochs", 2, "--train_view", view) == 0
    said = capsys.readouterr().out
    for what, path in zip(("train", "val"), broken):
        assert said.count(f"{what:8}without 1 unreadable images: {path}: is no JPEG") == 1
    found = json.loads(said.splitlines()[-1])
    assert (found["images"], found["unreadable"]) == (7, 2)


def test_class_numbers_are_those_of_image_folder(weights, photos_and_val, tmp_path):
    for half in ("train", "val"):
        for old, new in zip(("class_0", "class_1", "class_2", "class_3"), ("1", "2", "10", "11")):
            (photos_and_val / half / old).rename(photos_and_val / half / new)
    flags = ["--train_view", "center", "--epochs", 30, "--lr", 2]
    assert linear(weights, photos_and_val, tmp_path / "out", *flags) == 0
    backbone = vit_nano(patch_size=8, img_size=[16]).eval()
    backbone.load_state_dict(torch.load(weights))
    source = FolderSource(photos_and_val / "train")
    x, _ = all_features(source, backbone, 4, False)
    state = torch.load(tmp_path / "out" / "checkpoint.pth.tar")["state_dict"]
    predicted = nn.functional.linear(x, state["module.linear.weight"], state["module.linear.bias"]).argmax(1)
    theirs = [sorted(["1", "2", "10", "11"])[i] for i in predicted]
    assert np.mean([theirs[i] == source.classes[source.labels[i]] for i in range(len(source))]) > 0.8


def test_a_view_of_random_parts_gives_rows_in_the_order_asked_for(weights, photo_folder):
    source = FolderSource(photo_folder)
    backbone = vit_nano(patch_size=8, img_size=[16])
    backbone.load_state_dict(torch.load(weights))
    tokens = Tokens(backbone=backbone, source=source, labels=source.labels, inputs=sweep_inputs(backbone), batch_size=4)
    indices = np.array([9, 3, 30, 14, 0])
    together = list(tokens.rows(indices, RandomView(16, 0, 7), []))
    assert torch.equal(torch.cat([labels for _, labels in together]), torch.from_numpy(source.labels[indices]))
    rows = torch.cat([rows for rows, _ in together])
    assert rows.shape == (5, 5 * 96)
    ((alone, _),) = tokens.rows(indices[2:3], RandomView(16, 0, 7), [])
    assert torch.allclose(alone[0], rows[2], atol=1e-5)
    ((later, _),) = tokens.rows(indices[2:3], RandomView(16, 0, 8), [])
    assert not torch.allclose(later[0], rows[2], atol=1e-2)


def no_backbone(weights, data, out):
    torch.save({"teacher": {"a": torch.zeros(2)}}, out.parent / "odd.pth")
    return ["--pretrained_weights", out.parent / "odd.pth"], "has no Vision Transformer under 'teacher'"


def unlabelled(weights, data, out):
    return ["--data_path", data / "train" / "class_0"], "labels are needed, from at least two class folders"


def one_class(weights, data, out):
    for half in ("train", "val"):
        for name in ("class_1", "class_2", "class_3"):
            shutil.rmtree(data / half / name)
    return [], "labels are needed, from at least two class folders"


def other_classes(weights, data, out):
    (data / "val" / "class_3").rename(data / "val" / "class_4")
    return [], "expected the same classes in train/ and val/"


def unreadable(weights, data, out):
    for path in (data / "val").rglob("*.jpg"):
        path.write_bytes(b"broken")
    return [], "none of the images could be read: 8 images in"


def unreadable_training(weights, data, out):
    for path in (data / "train").rglob("*.jpg"):
        path.write_bytes(b"broken")
    return [], "none of the images could be read: 24 images in"


def odd_settings(weights, data, out):
    assert linear(weights, data, out, "--epochs", 2) == 0
    saved = torch.load(out / "checkpoint.pth.tar")
    torch.save({**saved, "settings": torch.zeros(2)}, out / "checkpoint.pth.tar")
    return ["--epochs", 2], "is no checkpoint of a linear classifier, or is damaged"


def odd_epoch(weights, data, out):
    assert linear(weights, data, out, "--epochs", 2) == 0
    torch.save({**torch.load(out / "checkpoint.pth.tar"), "epoch": 3}, out / "checkpoint.pth.tar")
    return ["--epochs", 2], "3 epochs are done, of 2"


def odd_momentum(weights, data, out):
    assert linear(weights, data, out, "--epochs", 2) == 0
    saved = torch.load(out / "checkpoint.pth.tar")
    saved["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(saved, out / "checkpoint.pth.tar")
    return ["--epochs", 2], "momentum 0 is (3,), expected (4, 384)"


def num_labels(weights, data, out):
    return ["--num_labels", 1000], "has 4 classes, got 1000"


def blocks(weights, data, out):
    return ["--n_last_blocks", 5], "--n_last_blocks: "


def a_file(weights, data, out):
    out.write_text("")
    return [], "--output_dir: expected a folder, got the file"


def another_log(weights, data, out):
    out.mkdir()
    (out / "log.txt").write_text("{}\n")
    return [], "holds the log.txt of something else"


def corrupt(weights, data, out):
    out.mkdir()
    (out / "checkpoint.pth.tar").write_bytes(b"PK\3\4broken")
    return [], "checkpoint.pth.tar is damaged"


def other_things(weights, data, out):
    out.mkdir()
    shutil.copy(weights, out / "checkpoint.pth.tar")
    return [], "checkpoint.pth.tar is no checkpoint of a linear classifier"


def epochs(weights, data, out):
    assert linear(weights, data, out, "--epochs", 2) == 0
    return ["--epochs", 3], "was made with 2, got 3"


def another_seed(weights, data, out):
    assert linear(weights, data, out, "--epochs", 2) == 0
    return ["--epochs", 2, "--seed", 1], "--seed: "


def other_weights(weights, data, out):
    assert linear(weights, data, out, "--epochs", 2) == 0
    torch.save(vit_nano(patch_size=8, img_size=[16]).state_dict(), out.parent / "other.pth")
    return ["--epochs", 2, "--pretrained_weights", out.parent / "other.pth"], "weights with the checksum"


def contradiction(weights, data, out):
    return ["--sweep", "--lr", 0.1], "--lr: --sweep tries several"


def no_head(weights, data, out):
    return ["--evaluate"], "no checkpoint at"


def no_epochs(weights, data, out):
    return ["--epochs", 0], "--epochs: expected a value above 0"


@pytest.mark.parametrize(
    "mistake",
    [
        no_backbone, unlabelled, one_class, other_classes, unreadable, unreadable_training, odd_settings,
        odd_epoch, odd_momentum, num_labels, blocks, a_file, another_log, corrupt,
        other_things, epochs, another_seed, other_weights, contradiction, no_head, no_epochs,
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(weights, photos_and_val, tmp_path, capsys, mistake):
    out = tmp_path / "out"
    flags, expected = mistake(weights, photos_and_val, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.name != ".lock"} if out.is_dir() else {}
    capsys.readouterr()
    assert linear(weights, photos_and_val, out, *flags) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastdino linear: ")
    assert said.count("\n") == 1
    assert expected in said
    if out.is_dir():
        assert {path: path.read_bytes() for path in out.rglob("*") if path.name != ".lock"} == before


def test_several_processes_are_refused(weights, photos_and_val, tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert linear(weights, photos_and_val, tmp_path / "out") == 2
    assert "one process does this, and 2 were launched; several share `fastdino features`" in capsys.readouterr().err
