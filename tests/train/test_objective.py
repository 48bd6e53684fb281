"""Another objective than DINO's trains through the same step and the same loop."""

import torch

from fastdino.objectives import Objective
from fastdino.train import build, learning, loop


class Distance(Objective):
    """Each of the student's views to the mean of the teacher's."""

    n_teacher_views = 2
    metric_names = ("spread",)

    def __init__(self, *_):
        super().__init__()
        self.means = []

    def columns(self, epochs):
        return {"weight": 1.0 + epochs}

    def evaluate(self, student, teacher, row, shared=None):
        target = teacher.unflatten(0, (2, -1)).mean(0)
        loss = row["weight"] * (student.unflatten(0, (-1, len(target))) - target).square().mean()
        return loss, (target.std(),), target.mean(0)

    def after_step(self, mean):
        self.means.append(mean)


def test_an_objective_brings_its_schedules_metrics_and_state(tiny, few_digits, monkeypatch, capsys):
    monkeypatch.setattr(learning, "DINOLoss", Distance)
    entries = []

    class Watching(build.Sink):
        def step(self, entry):
            entries.append(entry)

    result = loop.train(tiny(epochs=2, **few_digits), build.Own(callbacks=[Watching()]))
    assert result.epochs == 2
    assert all(entry["spread"] > 0 and entry["loss"] > 0 for entry in entries)
    assert "teacher entropy" not in capsys.readouterr().out


def test_the_objectives_columns_reach_it_by_name(monkeypatch):
    from train_steps import make_crops, make_networks, make_step

    step = make_step()
    weighted = type(step)(
        student=make_networks(), teacher=make_networks().requires_grad_(False), loss=Distance(), optimizer="adamw",
        schedules=step.schedules, niter_per_ep=4, clip_grad=0,
    )  # fmt: skip
    crops = make_crops()
    first, second = weighted(crops, 3), weighted.schedule.row["weight"].clone()
    weighted(crops, 4)
    assert float(second) == 1.0
    assert float(weighted.schedule.row["weight"]) == 2.0
    assert first._fields == ("loss", "spread", "grad_norm", "state")
    assert len(weighted.loss.means) == 2
    assert weighted.loss.means[0].shape == torch.Size([48])
