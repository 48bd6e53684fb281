"""What goes wrong for reasons outside the code. The command line turns these into one line and an exit code."""

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake in what was asked for: exit code 2, nothing written."""


class TrainingError(RuntimeError):
    """A run that cannot go on (a non-finite loss, too many unreadable images, too little memory): exit code 1."""


class ExportError(RuntimeError):
    """A file that does not give the backbone's features, or that its library cannot read: exit code 1."""


NAMED_BAD = 3  # unreadable images that are named on the console

# Lines of PyTorch's messages that say how to find out more, not what happened.
ADVICE = (
    "Set TORCH", "You can suppress", "Search for `cuda", "CUDA kernel errors might be", "For debugging consider",
    "Compile with `TORCH_USE_CUDA_DSA`", "Device-side assertion", "For more details", "For even more", "Hint:",
    "Developer debug context", "import torch._dynamo", "torch._dynamo.config.suppress_errors",
)  # fmt: skip


def chain(error: BaseException) -> list[BaseException]:
    """The error, what it was raised from or while handling, and so on to what came first."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
    return found


def reason(error: BaseException) -> str:
    """An exception in one line: the first and the last line that say what happened, and what it came from."""

    def words(e: BaseException) -> str:
        lines = [line.strip() for line in str(e).partition("from user code:")[0].splitlines()]
        lines = [line for line in lines if line and not line.startswith(ADVICE)] or [""]
        return f"{type(e).__name__}: {' '.join(dict.fromkeys((lines[0], lines[-1])))}".removesuffix(": ").removesuffix(
            "."
        )[:300]

    first, last = words(chain(error)[-1]), words(error)
    return last if first in last or first.partition(": ")[2] in last else f"{last}, after {first}"


def printable(text: object) -> str:
    """A name as it can be shown and logged: control characters, and bytes that are no text, become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def some_of(bad: Sequence[str], of: int | None = None) -> str:
    """How many images cannot be read, and the first of the lines about them."""
    named = "; ".join(bad[:NAMED_BAD]) + ("; ..." if len(bad) > NAMED_BAD else "")
    among = f" of {of:,}" if of else ""
    return f"{len(bad)} unreadable{among} images: {named}"
