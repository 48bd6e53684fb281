"""Whether a run learns: one line, once, where its numbers say that it does not, with what to try.

K prototypes. The teacher's entropy is between 0 and ln K.
"""

import math
from collections.abc import Callable, Sequence

from fastdino.eval import EVALUATIONS, TITLES
from fastdino.train.config import TrainConfig
from fastdino.train.recipes import SMALL_FOLDER
from fastdino.train.sinks import Entry, LogFile, Sink, add

UNIFORM = 0.995  # of ln K: the teacher prefers no prototype, and the student learns that
ONE = 0.01  # of ln K, of both teacher's entropy and loss: all images have the same prototype
COLLAPSED_FOR = 2  # epochs in a row, after warm-up: a run may come near and leave again
EVALUATED = 3  # evaluations after warm-up before one can say that they stand still
RISE = 0.05  # of what is left to be gained: less, over all of the evaluations, is none
FEW = 1024  # prototypes that no run has too many of
LARGE = 0.4  # of an image: local crops that show enough of whatever it is
FALL = 0.05  # below the best, in two evaluations in a row


def collapse(entries: Sequence[Entry], out_dim: int) -> str:
    """Of the last epochs, in words; empty where there is none."""
    last, most = entries[-COLLAPSED_FOR:], math.log(out_dim)
    if len(last) < COLLAPSED_FOR or any(entry.get("train_teacher_entropy") is None for entry in last):
        return ""
    entropies = [entry["train_teacher_entropy"] for entry in last]
    if min(entropies) > UNIFORM * most:
        return f"the teacher prefers no prototype (entropy {entropies[-1]:.3f}, ln K is {most:.3f})"
    if max(*entropies, *(entry["train_loss"] for entry in last)) < ONE * most:
        return f"the teacher has one prototype for all images (entropy {entropies[-1]:.3f} of at most {most:.3f})"
    return ""


def fall(name: str, values: Sequence[float]) -> str:
    """Of an evaluation's values after warm-up, in words; empty where there is none."""
    if len(values) < EVALUATED or max(values[-2:]) >= max(values) - FALL:
        return ""
    return f"{TITLES.get(name, name)} falls: {values[-1]:.4f}, after {max(values):.4f} at best"


def standstill(name: str, before: float | None, values: Sequence[float]) -> str:
    """Of an evaluation's values after warm-up, in words; empty where there is none."""
    if len(values) < EVALUATED or before is None or max(values) >= before + RISE * (1 - before):
        return ""
    how = "is lower" if values[-1] < before - FALL else "stands still"  # early on, many runs go down before they rise
    return f"{TITLES.get(name, name)} {how}: {values[-1]:.4f}, before training {before:.4f}"


class Watch(Sink):
    """Says it. Of a resumed run it knows the epochs that are in the log."""

    def __init__(self, config: TrainConfig, n_images: int, log: LogFile, say: Callable[[str], object]) -> None:
        self._config, self._n_images, self._say = config, n_images, say
        self._entries = log.read()
        self._has_spoken = False

    def epoch(self, entry: Entry) -> None:
        """Look at the run so far. What happens while the learning rate still rises is left alone."""
        add(self._entries, entry)
        config = self._config
        n_warm = max(config.warmup_epochs, config.warmup_teacher_temp_epochs, config.freeze_last_layer)
        warm = [entry for entry in self._entries if entry["epoch"] >= n_warm]
        unstable, still = [collapse(warm, config.out_dim)], []
        for name in EVALUATIONS:
            values = [entry[name] for entry in warm if entry.get(name) is not None]
            before = self._entries[0].get(f"{name}_before")
            unstable.append(fall(name, values))
            still.append(standstill(name, before, values))
        found = next(filter(None, [*unstable, *still]), "")
        if found and not self._has_spoken:
            self._has_spoken = True
            self._say(f"  not learning: {found}; try {self._advice(found in still)}")

    def _advice(self, stands_still: bool) -> str:
        config = self._config
        if config.data_path and self._n_images <= SMALL_FOLDER and config.preset != "small":
            return "--preset small, which is for so few images"
        if stands_still:
            # Small parts of an image may say too little of it.
            larger = "" if config.local_crops_scale[0] >= LARGE else f", or --local_crops_scale {LARGE} 0.9"
            return f"more --epochs (now {config.epochs}){larger}"
        stable = [f"--{name} true" for name in ("use_bn_in_head", "norm_last_layer") if not getattr(config, name)]
        fewer = [f"--out_dim {FEW}"] if config.out_dim > FEW else []
        return ", ".join([*stable, f"--lr {config.lr / 2:g}", *fewer])
