"""Two runs in one folder: the second is told, and the first never notices.

cd tests && python -m trials.pairs [--quick]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trials.runs import Ended, Table, differences, last_line, run, start, trial_parser, wait


def _told(ended: Ended) -> list[str]:
    if ended.code == 2 and "another run is writing into" in last_line(ended.output):
        return []
    return [f"exit code {ended.code}: {ended.output[-500:]}"]


def beside(flags: list[str], ready: Callable[[Path], bool], expected: Path, folder: Path) -> list[str]:
    """What is wrong where a second run starts as soon as the first has come so far."""
    pid, output = start(folder)
    deadline = time.monotonic() + 30
    while not ready(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    words = _told(run(folder, flags))
    first = wait(pid, output)
    return words + (differences(expected, folder) if first.code == 0 else [first.output])


def at_once(expected: Path, folder: Path) -> list[str]:
    """What is wrong where two start at the same time in a folder that is not there yet."""
    started = [start(folder), start(folder)]
    ended = sorted((wait(*one) for one in started), key=lambda one: one.code)
    return [*_told(ended[1]), *(differences(expected, folder) if ended[0].code == 0 else [ended[0].output])]


def main() -> int:
    args = trial_parser(__doc__).parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        root, expected = Path(name), Path(name) / "expected"
        assert run(expected).code == 0
        for i in range(1 if args.quick else 3):
            table.add("two that start at once", f"{i}", at_once(expected, root / f"once{i}"))
            trials = {
                "a second before the first epoch": ([], lambda folder: (folder / "args.json").is_file()),
                "a second that would resume": ([], lambda folder: (folder / "checkpoint.pth").is_file()),
                "a second that would begin anew": (
                    ["--resume", "false"],
                    lambda folder: (folder / "checkpoint0001.pth").is_file(),
                ),
            }
            for kind, (flags, ready) in trials.items():
                table.add(kind, f"{i}", beside(flags, ready, expected, root / f"{kind}{i}"))
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
