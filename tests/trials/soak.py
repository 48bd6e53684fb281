"""An hour of epochs: memory and descriptors stay where they are.

cd tests && python -m trials.soak [--minutes 60]
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from trials.runs import Table, start, trial_parser, wait

FLAGS = ["--epochs", "100000", "--saveckp_freq", "0", "--num_workers", "2", "--knn_freq", "5", "--tensorboard", "true"]
MIB_PER_HOUR = 8.0  # of growth, which is put down to the curves' numbers of each epoch, and to the allocator


def watch(pid: int) -> tuple[float, int, int]:
    """(resident MiB, descriptors, threads) of a process."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    return (
        pages * os.sysconf("SC_PAGESIZE") / 2**20,
        len(list((process / "fd").iterdir())),
        len(list((process / "task").iterdir())),
    )


def main() -> int:
    parser = trial_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    minutes = 1.0 if args.quick else args.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        pid, output = start(folder, FLAGS)
        samples = []
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            time.sleep(minutes / 10 + 1)
            samples.append((time.monotonic() - began, *watch(pid)))
        os.kill(pid, signal.SIGTERM)
        ended = wait(pid, output)
        epochs = len((folder / "log.txt").read_text().splitlines())
    seconds, memory, descriptors, threads = np.array(samples[len(samples) // 5 :]).T  # the first fifth is warm-up
    slope = np.polyfit(seconds, memory, 1)[0] * 3600
    print(
        f"{epochs} epochs in {minutes:.0f} minutes: "
        f"{memory[0]:.0f} to {memory[-1]:.0f} MiB ({slope:+.1f} MiB an hour), "
        f"{descriptors.min():.0f} to {descriptors.max():.0f} descriptors, "
        f"{threads.min():.0f} to {threads.max():.0f} threads"
    )
    table = Table()
    grew = [f"{slope:.1f} MiB an hour"] if slope > MIB_PER_HOUR else []
    table.add("a soak: memory", f"{minutes:.0f} minutes", grew)
    # A checkpoint or the log may just be open when it is looked at.
    table.add(
        "a soak: descriptors and threads",
        f"{minutes:.0f} minutes",
        ["they grow"] * bool(np.median(descriptors[-20:]) > np.median(descriptors[:20]) or threads[-1] > threads[0]),
    )
    table.add("a soak: its end", f"{minutes:.0f} minutes", [] if ended.code == 143 else [ended.output[-1000:]])
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
