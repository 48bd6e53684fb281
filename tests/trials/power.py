"""Power cuts: the disk as it is at some moment of a run, on ext4; the run resumes by itself from that.

    cd tests && python -m trials.power [--cuts 20]        (as root, with loop devices)

The disk is a file. While the run is stopped by SIGSTOP, the file is copied twice, until two copies are equal: what the
kernel had not yet written is lost, as it is when the power goes. The copy is mounted, which replays its journal.
"""

import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trials.mounts import why_not
from trials.runs import NITER, Table, differences, run, start, trial_parser, wait

from fastdino.train.step import TrainStep

# The journal is written every second, names without the data that nobody synced: the worst moment comes soon.
OPTIONS = {"ext4": ",commit=1", "ext4, noauto_da_alloc": ",commit=1,noauto_da_alloc"}
PAUSE = 0.3  # seconds in each step, so that the journal is written in between


@contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[Path]:
    """An image of a file system at a folder."""
    folder.mkdir()
    subprocess.run(["mount", "-o", f"loop{options}", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _copy(disk: Path, copy: Path) -> None:
    """The disk at one moment."""
    again = copy.with_suffix(".again")
    while True:
        shutil.copyfile(disk, copy)
        shutil.copyfile(disk, again)
        if filecmp.cmp(copy, again, shallow=False):
            again.unlink()
            return


def slowly() -> None:
    """Sabotage: a pause in each step."""
    original = TrainStep.__call__
    TrainStep.__call__ = lambda *args: (time.sleep(PAUSE), original(*args))[1]  # type: ignore[method-assign]


def cut(seconds: float, options: str, expected: Path, root: Path) -> list[str]:
    """What is wrong after the power went so many seconds after the start of a run."""
    root.mkdir()
    disk, copy = root / "disk", root / "copy"
    with disk.open("wb") as file:
        file.truncate(96 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)
    with mounted(disk, root / "before", options) as folder:
        pid, output = start(folder / "run", sabotage=slowly)
        time.sleep(seconds)
        os.kill(pid, signal.SIGSTOP)
        _copy(disk, copy)
        os.kill(pid, signal.SIGKILL)
        wait(pid, output)
    with mounted(copy, root / "after", options) as folder:
        found = {path.name: path.stat().st_size for path in (folder / "run").glob("*")}
        resumed = run(folder / "run")
        words = differences(expected, folder / "run") if resumed.code == 0 else [f"{found}: {resumed.output}"]
    shutil.rmtree(root)
    return words


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--cuts", type=int, default=20)
    args = parser.parse_args()
    if reason := why_not():
        print(f"nothing was tried: no file system can be mounted ({reason})")
        return 2
    table, rng = Table(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        root, expected = Path(name), Path(name) / "expected"
        whole = run(expected)
        assert whole.code == 0, whole.output
        length = whole.seconds + 3 * NITER * PAUSE  # of a run that is slow
        for i in range(2 if args.quick else args.cuts):
            kind = list(OPTIONS)[i % len(OPTIONS)]
            seconds = rng.uniform(1.0, 1.2 * length)
            words = cut(seconds, OPTIONS[kind], expected, root / f"cut{i}")
            table.add(f"a power cut, {kind}", f"after {seconds:.2f} s", words)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
