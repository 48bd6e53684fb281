"""TensorBoard, Weights & Biases, MLflow: each a class, a flag and a line of LOGGERS, all of them in this file."""

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastdino.errors import UserError
from fastdino.train.fields import flag
from fastdino.train.sinks import Entry, Sink

if TYPE_CHECKING:
    from fastdino.train.config import TrainConfig


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What of an entry is a number to plot; its place in the run is not."""
    return {
        key: float(value)
        for key, value in entry.items()
        if isinstance(value, (int, float)) and key not in ("iteration", "epoch")
    }


class Logger(Sink):
    """Sends every number under train/ or epoch/, both over iterations. Made when the run begins to write."""

    def __init__(self, config: "TrainConfig", niter_per_ep: int) -> None:
        self._niter_per_ep = niter_per_ep
        self.open(config)

    def open(self, config: "TrainConfig") -> None:
        """Begin the run."""
        raise NotImplementedError

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Keep some numbers."""
        raise NotImplementedError

    def step(self, entry: Entry) -> None:
        """Under train/."""
        self.log({f"train/{name}": x for name, x in numbers(entry).items()}, entry["iteration"])

    def epoch(self, entry: Entry) -> None:
        """Under epoch/."""
        iteration = (entry["epoch"] + 1) * self._niter_per_ep
        self.log({f"epoch/{name}": x for name, x in numbers(entry).items()}, iteration)


class TensorBoard(Logger):
    """Event files in the output folder: `tensorboard --logdir FOLDER`."""

    def open(self, config: "TrainConfig") -> None:
        """Begin a file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(config.output_dir)

    def log(self, values: dict[str, float], iteration: int) -> None:
        """A point in each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class WandB(Logger):
    """A run in a project of Weights & Biases."""

    def open(self, config: "TrainConfig") -> None:
        """Begin the run; wandb asks for an account where it needs one."""
        import wandb

        self._run = wandb.init(project=config.wandb, dir=config.output_dir, config=asdict(config))

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Send some numbers."""
        self._run.log(values, step=iteration)

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class MLflow(Logger):
    """A run in an experiment of MLflow."""

    def open(self, config: "TrainConfig") -> None:
        """Begin the run, where MLFLOW_TRACKING_URI says."""
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(config.mlflow)
        mlflow.start_run()
        mlflow.log_params(asdict(config))

    def log(self, values: dict[str, float], iteration: int) -> None:
        """Send some numbers."""
        self._mlflow.log_metrics(values, step=iteration)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


@dataclass(frozen=True, kw_only=True)
class LoggerFlags:
    """Flags of a run that open a logger where they are given."""

    tensorboard: bool = flag(False, "Run", "write event files for TensorBoard into output_dir, too")
    wandb: str | None = flag(None, "Run", "project of Weights & Biases that is told the numbers, too")
    mlflow: str | None = flag(None, "Run", "experiment of MLflow that is told the numbers, too")


# By flag, which is also what its library is called.
LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def asked_loggers(config: "TrainConfig") -> list[type[Logger]]:
    """The loggers that a run asks for. Raises UserError where one is not installed."""
    asked = {name: logger for name, logger in LOGGERS.items() if getattr(config, name)}
    for name in asked:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--{name}: {name} is not installed: pip install {name}")
    return list(asked.values())
