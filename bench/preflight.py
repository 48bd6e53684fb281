"""What a host must have before bench/gpu.sh starts: python -m bench.preflight FOLDER [--quick].

In seconds, and without what it looks for: prints what is missing and exits with 2, or ends in a line that says where
the figures will come from. Triton compiles C against Python.h at the first launch of a kernel.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

NEEDED = ("torch", "triton", "numpy", "PIL", "cv2", "pytest", "pytest_benchmark")
OPTIONAL = {
    "simplejpeg": "nothing from JPEG files",
    "rich": "no training loop, of which the tests are skipped or fail",
    "sklearn": "no photographs: neither JPEG to weights nor the tests of crops",
    "skimage": "no photographs for the tests of crops",
    "matplotlib": "no pictures in the report",
    "hypothesis": "no property tests; none of them needs a GPU",
    "xformers": "attention by varlen and SDPA alone",
}
FREE_GB, FREE_GIB = 5, 12  # on disk: compiled kernels and their sources; on the GPU: ViT-S of 64 images is 8


def compiler() -> str | None:
    """What is wrong with it."""
    names = filter(None, (os.environ.get("CC"), "gcc", "clang"))
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        return "no C compiler: install gcc, or name one in CC"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "a.c")
        source.write_text("#include <Python.h>\n")
        command = [found, "-c", str(source), "-o", f"{source}.o", f"-I{sysconfig.get_path('include')}"]
        done = subprocess.run(command, capture_output=True, text=True)
    wrong = (done.stderr.strip().splitlines() or ["it failed"])[0]
    return None if done.returncode == 0 else f"{found} cannot compile with Python.h (python3-dev): {wrong}"


def module(name: str) -> str | None:
    """Why it cannot be imported."""
    try:
        importlib.import_module(name)
    except Exception as error:  # built for another torch, a missing library ...
        return f"{name}: {type(error).__name__}: {error}"
    return None


def gpu() -> str | None:
    """What is wrong with it; free memory is printed."""
    import torch

    if not torch.cuda.is_available():
        return f"no CUDA device for torch {torch.__version__} (built for CUDA {torch.version.cuda})"
    free, total = (n / 2**30 for n in torch.cuda.mem_get_info())
    print(f"{free:.0f} of {total:.0f} GiB free on the GPU{', another process is there' if free < 0.9 * total else ''}")
    return None if free >= FREE_GIB else f"{free:.1f} GiB free on the GPU, expected {FREE_GIB}"


def main(folder: str, quick: bool) -> int:
    """The exit code."""
    wrong = [compiler(), *map(module, NEEDED)]
    free = shutil.disk_usage(folder).free / 1e9
    wrong += [f"{free:.1f} GB free for {folder}, expected {FREE_GB}"] if free < FREE_GB else []
    wrong += [f"{folder} cannot be written to"] if not os.access(folder, os.W_OK) else []
    if not quick and "torch" in sys.modules:
        wrong.append(gpu())
    for name, loss in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            print(f"without {name}: {loss}")
    if missing := list(filter(None, wrong)):
        print(*(f"MISSING {reason}" for reason in missing), sep="\n")
        return 2
    os.environ["BENCH_QUICK"] = str(int(quick))
    from bench.measure import host

    print(", ".join(f"{name} {value}" for name, value in host().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--quick" in sys.argv))
