"""Triton's interpreter without work that changes nothing; on a kernel of ours that is more than half of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any


def quicken() -> None:
    """For as long as the process lives. A Triton that has not what is replaced here stays as slow as it is."""
    from triton.runtime import interpreter

    try:
        _without_unheard_overflows(interpreter)
        _with_one_look_at_the_language(interpreter)
        _with_remembered_types(interpreter)
        _with_objects_made_once(interpreter.tl.core)
    except (AttributeError, TypeError):
        pass


def _without_unheard_overflows(interpreter: Any) -> None:
    """Every sum and product of integers is computed again in 64 bits, for an assertion that only `debug` turns on."""
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)


def _with_one_look_at_the_language(interpreter: Any) -> None:
    """A launch puts the interpreter's functions into triton.language, and takes them out at its end.

    A call of a function in a kernel puts them in again, after a look at every name there is: once is enough.
    """
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[int] = set()  # the modules that have been put right since the launch

    def patch_once(function: Callable) -> Any:
        names = function.__globals__.values()
        modules = {id(value) for value in names if value is interpreter.tl or value is interpreter.tl.core}
        if modules and modules <= seen:
            return None
        seen.update(modules)
        return patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        seen.clear()
        try:
            run(self, *args, **kwargs)
        finally:
            seen.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


def _with_remembered_types(interpreter: Any) -> None:
    """What NumPy calls a type is looked up in a dictionary that is made anew for every look."""
    look_up, block, known = interpreter._get_np_dtype, interpreter.tl.block_type, {}

    def remembered(kind: Any) -> Any:
        name = (kind.element_ty if isinstance(kind, block) else kind).name
        if name not in known:
            known[name] = look_up(kind)
        return known[name]

    interpreter._get_np_dtype = remembered


def _with_objects_made_once(core: Any) -> None:
    """Each result of an operation works its shape out anew, three objects for each of its sides."""
    block, tensor = core.block_type.__init__, core.tensor.__init__
    of_blocks: dict[tuple, dict[str, Any]] = {}
    of_tensors: dict[tuple, dict[str, Any]] = {}

    def make_block(self: Any, element_ty: Any, shape: Any) -> None:
        sides = (side.value if isinstance(side, core.constexpr) else side for side in shape)
        key = (element_ty.__class__, element_ty.name, *sides)
        if key not in of_blocks:
            block(self, element_ty, shape)
            of_blocks[key] = vars(self).copy()
        vars(self).update(of_blocks[key])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        key = type.__class__, type.name
        if key not in of_tensors:
            tensor(self, handle, type)
            of_tensors[key] = vars(self).copy()
        vars(self).update(of_tensors[key], handle=handle, type=type, dtype=type.scalar)

    core.block_type.__init__, core.tensor.__init__ = make_block, make_tensor
