"""What a run gives back."""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. before, after: the evaluations' numbers ({"knn": 0.94}), empty without labels.

    epochs: finished ones. seconds: of this session. signal: the number of the one that interrupted it, or 0.
    backbone: the teacher's, as trained, on the run's device.
    """

    epochs: int
    before: dict[str, float]
    after: dict[str, float]
    seconds: float
    interrupted: bool
    signal: int
    backbone: nn.Module = field(repr=False)

    @property
    def knn_before(self) -> float | None:
        """k-NN accuracy before training."""
        return self.before.get("knn")

    @property
    def knn_after(self) -> float | None:
        """k-NN accuracy at the end."""
        return self.after.get("knn")
