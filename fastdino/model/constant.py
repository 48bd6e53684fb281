"""What a compiler takes as a constant."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Mark a function that a compiler runs while it traces; what it returns becomes a constant of the graph.

    This is torch.compiler.assume_constant_result without its import of the compiler, which takes a second of the start
    of every command. tests/model/test_attention.py holds the two against each other.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
