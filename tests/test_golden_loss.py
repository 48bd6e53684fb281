"""DINOLoss gives the original's losses, gradients and centers, call after call."""

import numpy as np
import pytest

from fastdino import DINOLoss

CASES = ["loss_fp64", "loss_fp32", "loss_large_logits_fp64", "loss_two_crops_fp64"]


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_center_match_the_original(golden, rel, name):
    data = golden(name)
    budget = 1e-10 if "fp64" in name else 1e-5
    loss = DINOLoss(int(data["K"]), int(data["ncrops"]), *data["args"]).to(data["student0"].dtype)
    assert np.array_equal(loss.teacher_temp_schedule, data["temp"].numpy())
    for i, epoch in enumerate(data["epochs"].tolist()):
        student = data[f"student{i}"].requires_grad_()
        value = loss(student, data[f"teacher{i}"], epoch)
        value.backward()
        assert rel(value, data[f"loss{i}"]) < budget
        assert rel(student.grad, data[f"grad{i}"]) < budget
        assert rel(loss.center, data[f"center{i}"]) < budget
