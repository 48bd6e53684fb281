"""A run that does not learn says so, once; one that does, or has only begun, says nothing."""

import math

import pytest

from fastdino.train import watch
from fastdino.train.folder import RunFolder
from fastdino.train.interrupt import Stop
from fastdino.train.loop import train
from fastdino.train.sinks import LogFile

LN_K = math.log(64)


def said(config, entries, n_images=1437):
    lines = []
    log = LogFile(RunFolder(config.output_dir, 0, print, Stop()))
    sink = watch.Watch(config, n_images, log, lines.append)
    for epoch, entry in enumerate(entries):
        sink.epoch({"epoch": epoch, "train_loss": 2.0, "train_teacher_entropy": 2.0, **entry})
    return lines


def test_a_run_that_truly_collapses_says_so(tiny, few_digits, capsys):
    train(tiny(epochs=4, momentum_teacher=0.5, lr=0.1, use_bn_in_head=False, drop_path_rate=0.0, **few_digits))
    out = capsys.readouterr().out
    assert "  not learning: the teacher has one prototype for all images (entropy 0.00" in out
    assert out.count("not learning") == 1
    assert "; try --use_bn_in_head true, --lr 0.05\n" in out


def test_a_teacher_that_prefers_nothing_is_named(tiny):
    uniform = {"train_loss": LN_K + 0.01, "train_teacher_entropy": LN_K - 0.001}
    (line,) = said(tiny(epochs=9), [{}, uniform, uniform, uniform])
    assert "prefers no prototype (entropy 4.158, ln K is 4.159)" in line


def test_warm_up_is_left_alone(tiny):
    uniform = {"train_teacher_entropy": LN_K}
    assert not said(tiny(epochs=9, warmup_epochs=4), [uniform] * 5)
    assert said(tiny(epochs=9, warmup_epochs=4), [uniform] * 6)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.50, 0.50, 0.51], "k-NN stands still: 0.5100, before training 0.5000"),
        ([0.60, 0.70, 0.63, 0.62], "k-NN falls: 0.6200, after 0.7000 at best"),
        ([0.42, 0.41, 0.40], "k-NN is lower: 0.4000, before training 0.5000"),
        ([0.48, 0.47, 0.46], "k-NN stands still: 0.4600, before training 0.5000"),  # by less than scatter
        ([0.48, 0.47, 0.40], "k-NN is lower: 0.4000, before training 0.5000"),
        ([0.50, 0.60, 0.59], None),
        ([0.70, 0.60, 0.69], None),  # one evaluation is no trend
        ([0.50, 0.50], None),
    ],
    ids=["still", "falling", "below the start", "a little below", "at last below", "learning", "one dip", "too early"],
)
def test_evaluations_that_do_not_rise_are_named(values, words, tiny):
    lines = said(tiny(epochs=9), [{"knn_before": 0.5}, *({"knn": value} for value in values)])
    assert (words is None and not lines) or (len(lines) == 1 and words in lines[0])


def test_what_is_learned_already_cannot_rise(tiny):
    assert not said(tiny(epochs=9), [{"knn_before": 0.99}, *[{"knn": 0.991}] * 3])


def test_a_small_folder_is_pointed_to_the_preset(tiny):
    entries = [{"knn_before": 0.5}, *[{"knn": 0.5}] * 3]
    (line,) = said(tiny(epochs=9, data_path="photos", preset="auto"), entries, 500)
    assert line.endswith("try --preset small, which is for so few images")
    (line,) = said(tiny(epochs=9, data_path="photos"), entries, 500_000)
    assert "more --epochs (now 9)" in line


def test_the_digits_numbers_raise_no_alarm(tiny):
    """Those of the first command's log: every eighth epoch, and the first two."""
    entropies = [5.946, 5.988, 3.484, 2.254, 1.250, 0.976, 0.881, 0.875]
    losses = [6.880, 6.544, 4.135, 2.938, 1.815, 1.451, 1.339, 1.278]
    evaluations = [None, None, 0.7778, 0.8667, 0.9333, 0.9389, 0.9389, 0.9417]
    numbers = zip(losses, entropies, evaluations)
    entries = [{"train_loss": loss, "train_teacher_entropy": entropy, "knn": knn} for loss, entropy, knn in numbers]
    assert not said(tiny(epochs=9, out_dim=1024), [{**entries[0], "knn_before": 0.5278}, *entries[1:]])
