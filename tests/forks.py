"""Python programs as forks of one process that has imported PyTorch, which each would take three CPU seconds for.

For programs of which only what they do is tested. Those that are killed, whose start or whose imports are tested, and
a launcher's, are started as people start them.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 300  # seconds
# Of others alone: a fork imports what is tested itself, from its own path and with its own environment.
IMPORTS = "torch torch._dynamo torch.distributed.fsdp torch.distributed.checkpoint torch._inductor.compile_fx"
IMPORTS += " sklearn.datasets matplotlib.figure PIL.Image pytest"


class Forks:
    """Starts the process that forks when the first program asks for it."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, *words: Any, env: Mapping[str, str] | None = None, cwd: Any = None) -> subprocess.CompletedProcess:
        """`python WORDS`. env: all of it."""
        [done] = self.run_together([words], env=env, cwd=cwd)
        return done

    def run_ranks(self, n: int, *words: Any, env: Mapping[str, str] | None = None) -> list[subprocess.CompletedProcess]:
        """n at once, with torchrun's numbers in their environment; where they meet is said by the words."""
        return self.run_together([words] * n, env=env)

    def run_together(
        self, programs: Sequence[Sequence[Any]], env: Mapping[str, str] | None = None, cwd: Any = None
    ) -> list[subprocess.CompletedProcess]:
        env, n = dict(os.environ if env is None else env), str(len(programs))
        with tempfile.TemporaryDirectory() as folder:
            jobs = []
            for i, words in enumerate(programs):
                rank = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
                rank = rank if n != "1" else {}
                job = {"words": list(map(str, words)), "env": env | rank, "cwd": str(cwd or os.getcwd())}
                jobs.append(job | {name: f"{folder}/{i}.{name}" for name in ("out", "err")})
            codes = self._ask(jobs)
            texts = [[Path(job[name]).read_text() for name in ("out", "err")] for job in jobs]
        return [subprocess.CompletedProcess(job["words"], *x) for job, x in zip(jobs, zip(codes, *zip(*texts)))]

    def _ask(self, jobs: list[dict[str, Any]]) -> list[int]:
        if self._server is not None and (code := self._server.poll()) is not None:
            warnings.warn(f"the process that forks had ended, with {code}; another is started", stacklevel=2)
            self._server = None
        if self._server is None:
            self._server = subprocess.Popen(  # in a session of its own: signals to this one's group are not for it
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(jobs) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, f"the process that forks ended, with {self._server.wait()}"
        return json.loads(answer)

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()  # its input ends


def _become(job: dict[str, Any]) -> None:
    """In a fork: the program's output, folder, environment and path."""
    signal.alarm(TIMEOUT)  # which ends it
    with open(os.devnull) as nothing, open(job["out"], "w") as out, open(job["err"], "w") as err:
        for number, file in enumerate((nothing, out, err)):
            os.dup2(file.fileno(), number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    first = job["cwd"] if job["words"][0] in ("-m", "-c") else os.path.dirname(job["words"][0])
    sys.path[:] = [first, *filter(None, job["env"].get("PYTHONPATH", "").split(os.pathsep)), *sys.path[1:]]


def _serve() -> dict[str, Any] | None:
    """What a fork is to run; None in the process itself, when it is no longer asked."""
    for line in iter(sys.stdin.readline, ""):
        pids = []
        for job in json.loads(line):
            pids.append(os.fork())
            if not pids[-1]:
                _become(job)
                return job
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)
    return None


if __name__ == "__main__":
    for name in IMPORTS.split():
        __import__(name)
    gc.collect()
    gc.freeze()  # else the first collection in each fork reads, and so copies, all of this: a third of a second
    if found := _serve():
        kind, sys.argv = found["words"][0], found["words"]
        if kind == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            code, sys.argv = sys.argv[1], ["-c", *sys.argv[2:]]
            exec(code, {"__name__": "__main__"})
        else:
            runpy.run_path(kind, run_name="__main__")
