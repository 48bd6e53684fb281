"""Disks that are full, fill up, are freed again, or go away: one line says so, and what was saved stays.

cd tests && python -m trials.disks [--quick]        (as root: it mounts file systems of a few megabytes)
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trials.mounts import why_not
from trials.runs import Ended, Table, differences, last_line, run, start, trial_parser, wait

from fastdino.train.checkpoint import load_checkpoint
from fastdino.train.folder import RunFolder

NO_WAIT = ["--disk_wait", "0"]


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of so many KiB at a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(folder: Path, option: str) -> None:
    """Make it larger, or read-only."""
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def refusal(ended: Ended, reason: str, folder: Path) -> list[str]:
    """What is wrong with how a run says that it cannot write."""
    words = []
    if ended.code != 1 or "Traceback" in ended.output:
        words.append(f"exit code {ended.code}: {ended.output[-1500:]}")
    if reason not in last_line(ended.output) or str(folder) not in last_line(ended.output):
        words.append(f"said: {last_line(ended.output)}")
    return words


def full(kib: int, expected: Path, root: Path) -> list[str]:
    """A disk that fills up; then it is freed, and the run goes on."""
    with small_disk(root, kib):
        folder = root / "run"
        ended = run(folder, NO_WAIT)
        words = [] if ended.code == 0 else refusal(ended, "No space left on device", folder)
        for path in folder.glob("checkpoint*.pth"):
            load_checkpoint(path)
        if left := [path.name for path in folder.glob("*.partial")]:
            words.append(f"left {left}")
        resize(root, "size=200m")
        resumed = run(folder, NO_WAIT)
        return words + (differences(expected, folder) if resumed.code == 0 else [resumed.output])


def freed(kib: int, expected: Path, root: Path) -> list[str]:
    """A disk that fills up, and is freed while the run waits."""
    with small_disk(root, kib):
        folder = root / "run"
        pid, output = start(folder, ["--disk_wait", "1"])
        deadline = time.monotonic() + 60
        while "Trying again" not in output.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        resize(root, "size=200m")
        ended = wait(pid, output)
        if ended.code or "Trying again for 1 minutes: make room" not in ended.output:
            return [ended.output]
        return differences(expected, folder)


def _in_save(n: int, do: Callable[[], object]) -> Callable[[], None]:
    """Sabotage: do something before the n-th file is written."""

    def apply() -> None:
        original, calls = RunFolder.write, [0]

        def write(self: RunFolder, *args: object) -> None:
            calls[0] += 1
            if calls[0] == n:
                do()
            original(self, *args)  # type: ignore[arg-type]

        RunFolder.write = write  # type: ignore[method-assign]

    return apply


def removed(n: int, root: Path) -> list[str]:
    """A folder that is removed before the n-th file is written."""
    folder = root / "run"
    return refusal(run(folder, sabotage=_in_save(n, lambda: shutil.rmtree(folder))), "No such file", folder)


def read_only(n: int, expected: Path, root: Path) -> list[str]:
    """A disk that becomes read-only before the n-th file is written, as after an error; then it is mounted anew."""
    disk, place = root / "disk", root / "place"
    place.mkdir(parents=True)
    with disk.open("wb") as file:
        file.truncate(96 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(disk), str(place)], check=True)

    folder = place / "run"
    mount("-o", "loop,errors=remount-ro")
    ended = run(folder, sabotage=_in_save(n, lambda: resize(place, "abort")))
    words = refusal(ended, "Read-only file system", folder)
    again = run(folder)
    if again.code != 2 or "Traceback" in again.output:
        words.append(f"started anew: exit code {again.code}: {again.output[-500:]}")
    subprocess.run(["umount", str(place)], check=True)
    mount("-o", "loop")
    resumed = run(folder)
    words += differences(expected, folder) if resumed.code == 0 else [resumed.output]
    subprocess.run(["umount", str(place)], check=True)
    disk.unlink()
    return words


def main() -> int:
    args = trial_parser(__doc__).parse_args()
    if reason := why_not():
        print(f"nothing was tried: no file system can be mounted ({reason})")
        return 2
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        root, expected = Path(name), Path(name) / "expected"
        assert run(expected).code == 0
        whole = sum(path.stat().st_size for path in expected.iterdir()) // 1024
        print(f"a whole run takes {whole} KiB")
        n = 3 if args.quick else 20
        for i in range(1, n + 1):
            words = full(max(8, whole * i // (n + 1)), expected, root / f"full{i}")
            table.add("a disk that fills up, then freed and resumed", f"{i} of {n + 1} parts", words)
        for i in range(1, 2 if args.quick else 6):
            words = freed(whole * i // 7, expected, root / f"freed{i}")
            table.add("a full disk that is freed while the run waits", f"{i} of 7 parts", words)
        for i in range(1, 3 if args.quick else 14):
            table.add("the folder is removed", f"before write {i}", removed(i, root / f"removed{i}"))
            words = read_only(i, expected, root / f"ro{i}")
            table.add("a disk becomes read-only, then writable", f"before write {i}", words)
    return table.show()


if __name__ == "__main__":
    sys.exit(main())
