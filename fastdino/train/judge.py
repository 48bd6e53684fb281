"""The evaluations of a run: when they are due, of which weights, and what happens where somebody stops them."""

from collections.abc import Callable, Sequence

from fastdino.eval import EVALUATIONS, TITLES, EvalSettings, evaluate
from fastdino.train import distributed
from fastdino.train.build import Parts
from fastdino.train.interrupt import Interrupted, Stop
from fastdino.train.sinks import LogFile

Found = dict[str, float]

MUCH_WORSE = 0.02  # than the weights as they came: worth a word
ADVICE = "a lower --lr, a higher --momentum_teacher or more --freeze_backbone_epochs stay closer to them"


class Judge:
    """Evaluates the teacher's backbone on the main process; the others wait, and get no numbers.

    Attributes: before, the numbers before training; latest, the last of each.
    """

    def __init__(self, parts: Parts, stop: Stop, say: Callable[[str], object]) -> None:
        self._parts, self._stop, self._say = parts, stop, say
        self.before: Found = {}
        self.latest: Found = {}
        self._from_weights = parts.config.init is not None
        self._said: set[str] = set()  # of images that cannot be read: once is enough

    def start(self, log: LogFile) -> None:
        """The weights as they came; of a resumed run, what its checkpoint or its log says of them."""
        if before := self._parts.resumed.before:
            self.before = dict(before)
        elif self._parts.resumed.iteration == 0:
            self.before = (
                self.evaluate("of the weights as they came" if self._from_weights else "before training") or {}
            )
        elif self._parts.process.is_main and (past := log.read()):
            pairs = ((name, past[0].get(f"{name}_before")) for name in EVALUATIONS)
            self.before = {name: value for name, value in pairs if value is not None}

    def after(self, epoch: int) -> Found | None:
        """The numbers of an epoch, counted from 0; empty where none are due, None where the run is to stop first."""
        config = self._parts.config
        is_last = epoch == config.epochs - 1
        due = [name for name, every in config.evaluations.items() if is_last or (epoch + 1) % every == 0]
        found = self.evaluate(names=due) if due else {}
        for name, value in (found or {}).items() if self._from_weights else ():
            if value < self.before.get(name, 0.0) - MUCH_WORSE:
                self._say(
                    f"{TITLES.get(name, name)} {value:.4f}, {self.before[name]:.4f} as the weights came: {ADVICE}"
                )
        return found

    def evaluate(self, when: str = "", names: Sequence[str] | None = None) -> Found | None:
        """Numbers now, empty without labels; None, on all processes, where somebody stopped the run meanwhile.

        names: of evaluations; all that the run has.
        """
        found: Found | None = {}
        parts = self._parts
        names = list(parts.config.evaluations) if names is None else names
        if names:
            parts.gather()
        if parts.process.is_main and names and parts.source.labels is not None:
            try:
                with self._stop.interruptible():
                    found = self._run(names)
            except Interrupted:
                found = None
            if when and found:
                self._say("; ".join(f"{TITLES.get(name, name)} {when}: {value:.4f}" for name, value in found.items()))
        distributed.barrier()
        if distributed.any_of(found is None, parts.process.device):
            return None
        self.latest |= found or {}
        return found

    def _run(self, names: Sequence[str]) -> Found:
        parts = self._parts
        resize, size = parts.config.eval_size
        settings = EvalSettings(
            resize=resize,
            size=size,
            limit=parts.config.knn_images,
            num_workers=parts.loader.num_workers if parts.config.data_path else 0,
            k=parts.config.knn_k,
            say=self._say_once,
        )
        return evaluate(names, parts.backbone, parts.source, parts.held_out, settings)

    def _say_once(self, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            self._say(words)
