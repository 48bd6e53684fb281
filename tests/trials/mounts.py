"""Whether file systems can be mounted here, which the trials of disks and of power cuts do."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

TOOLS = ("mount", "umount", "losetup", "mkfs.ext4")


def why_not() -> str | None:
    """Why not, in words; None where they can be, as found out by mounting one."""
    if os.geteuid():
        return "not root"
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"{', '.join(missing)} not found"
    with tempfile.TemporaryDirectory() as name:
        disk, place = Path(name) / "disk", Path(name) / "place"
        place.mkdir()
        with disk.open("wb") as file:
            file.truncate(8 * 2**20)
        for command in (["mkfs.ext4", "-q", "-F", str(disk)], ["mount", "-o", "loop", str(disk), str(place)]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{command[0]}: {done.stderr.strip()}"
        subprocess.run(["umount", str(place)], check=True)
    return None
