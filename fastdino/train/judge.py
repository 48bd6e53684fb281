"""The evaluations of a run: when they are due, of which weights, and what happens where somebody stops them."""

from collections.abc import Callable

from fastdino.eval import EVALUATIONS, EvalSettings
from fastdino.train import distributed
from fastdino.train.build import Parts
from fastdino.train.interrupt import Interrupted, Stop
from fastdino.train.sinks import LogFile

Found = dict[str, float]


class Judge:
    """Evaluates the teacher's backbone on the main process; the others wait, and get no numbers.

    Attributes: before, the numbers before training; latest, those of the last evaluation.
    """

    def __init__(self, parts: Parts, stop: Stop, say: Callable[[str], object]) -> None:
        self._parts, self._stop, self._say = parts, stop, say
        self.before: Found = {}
        self.latest: Found = {}

    def start(self, log: LogFile) -> None:
        """The weights as they came; of a resumed run, what its log says of them."""
        if self._parts.resumed.iteration == 0:
            self.before = self.evaluate("before training") or {}
        elif self._parts.process.is_main and (past := log.read()):
            pairs = ((name, past[0].get(f"{name}_before")) for name in EVALUATIONS)
            self.before = {name: value for name, value in pairs if value is not None}

    def after(self, epoch: int) -> Found | None:
        """The numbers of an epoch, counted from 0; empty where none are due, None where the run is to stop first."""
        config = self._parts.config
        is_due = config.knn_freq and (epoch + 1) % config.knn_freq == 0
        return self.evaluate() if is_due or epoch == config.epochs - 1 else {}

    def evaluate(self, when: str = "") -> Found | None:
        """All numbers now, empty without labels; None, on all processes, where somebody stopped the run meanwhile."""
        found: Found | None = {}
        parts = self._parts
        if parts.process.is_main and parts.config.knn_freq and parts.source.labels is not None:
            try:
                with self._stop.interruptible():
                    found = self._run_all()
            except Interrupted:
                found = None
            if when and found and "knn" in found:
                self._say(f"k-NN {when}: {found['knn']:.4f}")
        distributed.barrier()
        if distributed.any_of(found is None, parts.process.device):
            return None
        self.latest = found or {}
        return found

    def _run_all(self) -> Found:
        parts, found = self._parts, Found()
        resize, size = parts.config.eval_size
        settings = EvalSettings(
            resize=resize,
            size=size,
            limit=parts.config.knn_images,
            num_workers=parts.loader.num_workers if parts.config.data_path else 0,
            k=parts.config.knn_k,
            say=self._say,
        )
        for evaluation in EVALUATIONS.values():
            found |= evaluation(parts.backbone, parts.source, parts.held_out, settings)
        return found
