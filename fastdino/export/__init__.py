"""A trained backbone for other libraries: written, read back by the library, and compared before it gets its name."""

import glob
import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image

from fastdino import files
from fastdino.data.decode import BadImage, decode
from fastdino.data.sources import read_file
from fastdino.data.views import View
from fastdino.errors import ExportError, UserError, printable, reason
from fastdino.export.check import TOLERANCE, Checked, check, quiet, sample_images
from fastdino.export.formats import FORMATS
from fastdino.export.kinds import Format, Model
from fastdino.model import VisionTransformer
from fastdino.model.archs import TIMM
from fastdino.model.inferred import vit_options


@dataclass(frozen=True)
class Exported:
    """What was written. checked: how close its features are. use: lines of Python that read it."""

    path: Path
    format: str
    model: Model
    checked: Checked
    use: Sequence[str]


def export(
    pretrained_weights: str | Path,
    output: str | Path,
    format: str,
    *,
    checkpoint_key: str = "teacher",
    num_heads: int | None = None,
    size: int | None = None,
    images: Sequence[str | Path] = (),
) -> Exported:
    """Write the backbone of a checkpoint for another library: `fastdino.export("checkpoint.pth", "vit.onnx", "onnx")`.

    format: of FORMATS. checkpoint_key, num_heads: as in `load_backbone`. size: side of the images in pixels that the
    positions are laid out for, and the only one that onnx and pt2 take then; without it, as trained, and onnx and pt2
    take any. images: files to compare features on; without them, photographs of scikit-learn.
    The file is read back by its library and compared with the backbone, and gets its name only then.
    Raises UserError, before anything is written, where this cannot be done; ExportError where the library cannot read
    the file, or the features differ by more than TOLERANCE at the size it is laid out for, or at any size for formats
    that promise all. Nothing is left behind then.
    """
    if format not in FORMATS:
        raise UserError(f"--format: expected one of {', '.join(FORMATS)}, got {printable(format)}")
    kind, path = FORMATS[format], Path(output)
    _check_output(path, kind, format)
    pictures = [_open_image(name) for name in images] or sample_images()
    with quiet():
        _check_libraries(kind, format)
    backbone, model = _open(pretrained_weights, checkpoint_key, num_heads, size, kind, format)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{files.TEMPORARY}")
    _remove_left_behind(path)
    try:
        temporary.mkdir()
        written = temporary / path.name
        with quiet():
            _write(kind, format, model, written)
            checked = _checked(kind, format, backbone, model, written, pictures)
        os.rename(written, path)
        files.sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"--output: {printable(path)} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with quiet():
        use = kind.use(model, path)
    return Exported(path, format, model, checked, use)


def _check_output(path: Path, kind: Format, format: str) -> None:
    if kind.suffixes and path.suffix.lower() not in kind.suffixes:
        expected = " or ".join(kind.suffixes)
        raise UserError(f"--output: expected a name that ends in {expected} for {format}, got {printable(path)}")
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder {printable(path.parent)}")
    if os.path.lexists(path):
        raise UserError(f"--output: {printable(path)} exists; name another, or remove it first")


def _check_libraries(kind: Format, format: str) -> None:
    for name in kind.needs:
        try:
            importlib.import_module(name)
        except Exception as error:  # also of what it needs itself, at any depth
            missing = getattr(error, "name", None) or name
            install = name if missing.partition(".")[0] == name else f"{name} {missing.partition('.')[0]}"
            raise UserError(
                f"--format {format} needs {name}, which cannot be imported ({reason(error)}): pip install {install}"
            ) from error


def _open_image(name: str | Path) -> Image.Image:
    try:
        return decode(read_file(name))
    except (OSError, BadImage) as error:
        raise UserError(f"--images: {printable(name)}: {error}") from error


def _open(
    weights: str | Path, key: str, num_heads: int | None, size: int | None, kind: Format, format: str
) -> tuple[VisionTransformer, Model]:
    """(the backbone as trained, what is written)."""
    from fastdino.train.checkpoint import backbone_of, eval_size, load_checkpoint

    checkpoint = load_checkpoint(weights)
    try:
        backbone = backbone_of(checkpoint, weights, key, num_heads)
    except UserError as error:
        arch = getattr(checkpoint.get("args"), "arch", None)
        if not (isinstance(arch, str) and arch.startswith(TIMM)):
            raise
        raise UserError(
            f"{error}. It was trained as {printable(arch)}, which is no Vision Transformer of ours, and cannot be "
            f"exported: its weights under {key!r} have timm's names behind 'backbone.', and timm loads them as they are"
        ) from error
    if not (backbone.is_dinos or kind.takes_newer):
        others = ", ".join(name for name, other in FORMATS.items() if other.takes_newer)
        raise UserError(f"--format {format}: {weights} is a backbone of DINOv2 or DINOv3, which can be {others} so far")
    if (channels := backbone.patch_embed.proj.in_channels) != 3:
        raise UserError(f"{weights} takes images of {channels} channels: only those of 3 can be exported")
    side = backbone.patch_embed.img_size if size is None else size
    if not backbone.patch_embed.patch_size <= side < 2**16:
        raise UserError(f"--size: expected at least the patch size {backbone.patch_embed.patch_size}, got {side}")
    view = View(max(side, eval_size(checkpoint, side)), side)
    fixed = size is not None or (kind.is_graph and not backbone.is_dinos)
    return backbone, Model(laid_out_for(backbone, side), view, fixed)


def laid_out_for(backbone: VisionTransformer, size: int) -> VisionTransformer:
    """The same network, whose positions are those that the original interpolates for square images of side `size`."""
    embed = backbone.patch_embed
    if size == embed.img_size or backbone.rope_embed is not None:
        return backbone
    positions = backbone.interpolate_pos_encoding(backbone.pos_embed, size, size)
    state = {**backbone.state_dict(), "pos_embed": positions}
    laid_out = VisionTransformer([size], num_heads=backbone.num_heads, **vit_options(state))
    laid_out.load_state_dict(state)
    return laid_out.eval().requires_grad_(False)


def _write(kind: Format, format: str, model: Model, path: Path) -> None:
    try:
        kind.write(model, path)
    except OSError:
        raise
    except Exception as error:  # of an exporter
        raise ExportError(f"the {format} file cannot be made: {reason(error)}") from error


def _checked(
    kind: Format, format: str, backbone: VisionTransformer, model: Model, written: Path, images: list[Image.Image]
) -> Checked:
    """Raises ExportError where the file is not as good as the backbone."""
    try:
        checked = check(backbone, model, kind.load(model, written), images)
    except Exception as error:
        raise ExportError(f"the {format} file cannot be read back, and was removed: {reason(error)}") from error
    promised = checked.differences[:1] if kind.own_positions else checked.differences
    for difference in promised:
        if not difference.is_small:
            raise ExportError(
                f"the {format} file was removed: at {difference.size} pixels its features differ from the backbone's "
                f"by {difference.relative:.1e} of the largest, more than {TOLERANCE:g}"
            )
    return checked


def _remove_left_behind(path: Path) -> None:
    """What exports to the same name left that were killed."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*{files.TEMPORARY}"):
        number = folder.name.removesuffix(files.TEMPORARY).rpartition(".")[2]
        with suppress(ValueError, PermissionError):
            try:
                os.kill(int(number), 0)  # asks whether there is such a process
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)


class _Callable(ModuleType):
    """A package and a function of one name: whichever way somebody imports it, it can be called."""

    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Callable
