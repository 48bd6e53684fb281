"""Who a process is, as launchers say it; and in which order a run with several GPUs ends. GPUs are played."""

from unittest import mock

import pytest
import torch

from fastdino.errors import UserError
from fastdino.train import distributed, loop
from fastdino.train.config import TrainConfig


@pytest.fixture
def launched(monkeypatch):
    """launched(n_gpus, RANK=..., ...): the process that `start` makes of this, and what the group was opened with."""

    def launched_(n_gpus, **env):
        for name in list(distributed.os.environ):
            if name.startswith(("SLURM_", "RANK", "LOCAL_", "WORLD_SIZE")):
                monkeypatch.delenv(name)
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        opened, beside = mock.Mock(), mock.Mock(return_value=None)
        monkeypatch.setattr(distributed.dist, "init_process_group", opened)
        monkeypatch.setattr(distributed.dist, "new_group", beside)
        process = distributed.start("auto", "env://")
        return process, opened.call_args, beside.call_args

    return launched_


def test_torchrun_gives_each_process_its_gpu(launched):
    process, opened, beside = launched(8, RANK=11, LOCAL_RANK=3, WORLD_SIZE=16)
    assert (process.rank, process.world_size, process.device) == (11, 16, torch.device("cuda", 3))
    assert opened.args == ("nccl",)
    assert opened.kwargs["device_id"] == process.device
    assert beside.kwargs["backend"] == "gloo"
    assert beside.kwargs["timeout"].total_seconds() > 24 * 3600  # rank 0 may evaluate for hours


def test_slurm_may_show_each_task_its_own_gpu_alone(launched):
    process, _, _ = launched(1, SLURM_PROCID=5, SLURM_LOCALID=5, SLURM_STEP_NUM_TASKS=8, SLURM_NTASKS=8)
    assert (process.rank, process.world_size, process.device) == (5, 8, torch.device("cuda", 0))


def test_slurm_without_localid_counts_gpus(launched):
    process, _, _ = launched(4, SLURM_PROCID=6, SLURM_STEP_NUM_TASKS=8, SLURM_NTASKS=8)
    assert process.device == torch.device("cuda", 2)


def test_a_batch_script_that_nobody_launched_with_srun_is_alone(launched):
    """sbatch sets SLURM_NTASKS and SLURM_PROCID=0 for the script itself; seven others would never come."""
    process, opened, _ = launched(8, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NTASKS=8)
    assert (process.rank, process.world_size, process.device) == (0, 1, torch.device("cuda", 0))
    assert opened is None


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"RANK": 0}, "WORLD_SIZE is ''"),
        ({"RANK": "first", "WORLD_SIZE": 2}, "RANK is 'first'"),
        ({"SLURM_STEP_NUM_TASKS": 2}, "SLURM_PROCID is ''"),
        ({"SLURM_STEP_NUM_TASKS": "2(x3)"}, "SLURM_STEP_NUM_TASKS is '2.x3.'"),
    ],
    ids=["torchrun", "no number", "srun", "no number of srun's"],
)
def test_an_incomplete_environment_is_one_line(launched, env, named):
    with pytest.raises(UserError, match=f"environment is incomplete: {named}, expected a number; launch with torchrun"):
        launched(1, **env)


@pytest.mark.parametrize("by", ["RANK WORLD_SIZE", "SLURM_PROCID SLURM_STEP_NUM_TASKS"])
def test_processes_that_cannot_meet_are_one_line(monkeypatch, by):
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(by.split(), ("0", "2")):
        monkeypatch.setenv(name, value)
    expected = (
        r"--dist_url: the 2 processes cannot meet: MASTER_ADDR and MASTER_PORT not set; torchrun sets them, .*srun"
    )
    with pytest.raises(UserError, match=expected):
        distributed.start("cpu", "env://")


@pytest.mark.parametrize("url", ["env://", "tcp://here:29500"])
def test_a_meeting_place_that_is_taken_is_one_line(monkeypatch, url):
    error = torch.distributed.DistNetworkError("The server socket has failed to listen\nport: 29500")
    monkeypatch.setattr(distributed.dist, "init_process_group", mock.Mock(side_effect=error))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
        if url != "env://":
            monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="the 2 processes cannot meet: DistNetworkError: The server socket has failed"):
        distributed.start("cpu", url)


class Ended(BaseException):
    """Neither an Exception nor caught by name: as Ctrl-C is."""


@pytest.mark.parametrize("how", [None, RuntimeError("broken"), KeyboardInterrupt(), Ended()], ids=repr)
def test_the_graph_goes_before_the_process_group(monkeypatch, how):
    """destroy_process_group waits for ever for a communicator that a captured graph still holds."""
    order, close = mock.Mock(), loop.Run.close
    run = order.run
    run.train.side_effect = how
    run.close = lambda: close(run)
    monkeypatch.setattr(loop, "Run", lambda *_: run)
    monkeypatch.setattr(distributed, "start", lambda *_: None)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "synchronize", order.synchronize)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", order.destroy)
    if how is None:
        loop.train(TrainConfig(data_path="x"))
    else:
        with pytest.raises(type(how)):
            loop.train(TrainConfig(data_path="x"))
    assert order.mock_calls == [
        mock.call.run.train(),
        mock.call.run.parts.loader.close(),
        mock.call.run.parts.step.close(),
        mock.call.run.folder.unlock(),
        mock.call.synchronize(),
        mock.call.destroy(),
    ]


def test_a_device_that_failed_does_not_hide_what_ended_the_run(monkeypatch):
    run = mock.Mock()
    run.train.side_effect = ValueError("the cause")
    monkeypatch.setattr(loop, "Run", lambda *_: run)
    monkeypatch.setattr(distributed, "start", lambda *_: None)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=RuntimeError("CUDA error: illegal address")))
    destroyed = mock.Mock()
    monkeypatch.setattr(distributed.dist, "destroy_process_group", destroyed)
    with pytest.raises(ValueError, match="the cause"):
        loop.train(TrainConfig(data_path="x"))
    assert destroyed.called
