"""Training, as a command (`python -m fastdino.train`) and as a function: `fastdino.train(...)` calls this module."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdino.train.result import TrainResult


def train(
    *,
    dataset: Any = None,
    val_dataset: Any = None,
    backbone: Any = None,
    callbacks: Any = (),
    config: Any = None,
    **flags: Any,
) -> "TrainResult":
    """Train DINO: `fastdino.train(data_path="photos/", arch="vit_small", epochs=100, output_dir="runs/photos")`.

    flags: those of `fastdino train`, under the same names and with the same defaults; tuples for those with several
    values. With neither data_path nor dataset: scikit-learn's digits, with their own recipe.
    dataset, val_dataset: any `torch.utils.data.Dataset` with a length whose items are images (PIL, uint8 arrays
    (H, W, 3), tensors (3, H, W) in uint8 or in [0, 1]), alone or first in a tuple. Read from several threads. Class
    numbers in its attribute `targets` are used for k-NN alone.
    backbone: a module of your own instead of arch: images (B, 3, H, W) of any size to features (B, embed_dim), with the
    attribute embed_dim. The teacher gets a copy of it.
    config: a JSON file with flags, as args.json of another run is one; those given as arguments win.
    callbacks: instances of classes derived from `fastdino.Sink`, told the numbers as they come.
    Returns a TrainResult: the numbers of the evaluations, and the trained backbone.
    Raises UserError (a ValueError) before anything is written where the run cannot be, TrainingError (a RuntimeError)
    where it cannot go on.
    """
    from fastdino.errors import UserError
    from fastdino.train.build import Own
    from fastdino.train.distributed import launched
    from fastdino.train.flags import check_images, config_from_flags, read_config
    from fastdino.train.loop import train as run
    from fastdino.train.preset import before_images, with_preset
    from fastdino.train.sinks import Sink

    for callback in callbacks:
        if not isinstance(callback, Sink):
            raise UserError(
                f"callbacks: expected instances of classes derived from fastdino.Sink, got {type(callback).__name__}"
            )
    if config is not None:
        flags = {**read_config(config), **flags}
    is_demo, n_processes = dataset is None and not flags.get("data_path"), launched().world_size
    # What is wrong with the flags is said before the images are looked for.
    config_from_flags(before_images(flags), is_demo)
    if dataset is None:
        check_images(flags, n_processes)
    given, source = with_preset(flags, n_processes, dataset, backbone)
    return run(config_from_flags(given, is_demo), Own(dataset, val_dataset, backbone, tuple(callbacks), source))


class _Callable(ModuleType):
    """A package and a function of one name: whichever way somebody imports it, it can be called."""

    __call__ = staticmethod(train)


sys.modules[__name__].__class__ = _Callable
