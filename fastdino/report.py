"""One page about a run: `report.html`, which needs no other file, no script and no network."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fastdino import __version__, files
from fastdino.data.channels import converted, in_colors, open_images, read_pixels
from fastdino.data.digits import load_digits
from fastdino.data.sources import ImageSource
from fastdino.data.views import View
from fastdino.doctor import environment
from fastdino.errors import UserError, some_of
from fastdino.eval import EVALUATIONS, TITLES
from fastdino.eval.attention_maps import attention_figure, look
from fastdino.eval.features import stream
from fastdino.eval.knn import Features, knn_accuracy
from fastdino.eval.pca import patch_colors, patch_tokens, pca_figure
from fastdino.eval.pictures import row_labels
from fastdino.model import VisionTransformer
from fastdino.train.checkpoint import any_backbone_of, load_checkpoint
from fastdino.train.config import TrainConfig
from fastdino.train.curves import draw_curves
from fastdino.train.sinks import read_log

THUMBNAIL = 112  # pixels
SHOWN = 6  # images whose attention, components and neighbours are shown
NEIGHBOURS = 7
KS = (1, 5, 20)

Say = Callable[[str], object]


@dataclass(frozen=True)
class Picture:
    """A section that is one picture. data: a URI that holds it."""

    title: str
    caption: str
    data: str


@dataclass(frozen=True)
class Table:
    """A section that is a table; folded: shown when it is clicked at."""

    title: str
    rows: Sequence[Sequence[object]]
    head: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True)
class Cell:
    """An image among others. kind: query, same (as the query's class) or other."""

    kind: str
    name: str
    caption: str
    data: str


def write_report(
    run: Path, output: Path, data_path: str | None = None, n_images: int = 2000, device: str = "cpu", say: Say = print
) -> None:
    """Write the page of the run in a folder.

    data_path: its images, where they have moved. n_images: at most so many, evenly spread, are searched for neighbours.
    Parts that cannot be made are left out, and the page says why. Raises UserError where there is no run.
    """
    entries, config = read_log(run), _arguments(run)
    notes: list[str] = []
    pictures, tables = [], []
    if entries:
        caption = "A teacher entropy at ln K means that all images look alike to it (collapse)."
        pictures.append(Picture("Curves", caption, _svg(draw_curves(entries, config.out_dim))))
    neighbours: list[list[Cell]] = []
    about = ""
    numbers: dict[str, float] = {}
    try:
        source = _source(config, data_path)
        looked_at = _LookedAt.of(run, config, source, n_images, device)
        say(f"looked at {len(looked_at.kept):,} of {len(source):,} images")
        if looked_at.bad:
            notes.append(f"Without {some_of(looked_at.bad)}")
        pictures += looked_at.pictures(notes)
        neighbours = looked_at.neighbours()
        about = f"By cosine of the features, among {len(looked_at.kept):,} images; {source.describe()}."
        numbers = looked_at.votes()
    except UserError as error:
        notes.append(f"No pictures of images: {error}")
        say(notes[-1])
    tables.append(Table("Evaluations", _evaluations(run, entries, numbers), ("what", "value", "of")))
    changed = [(name, *values) for name, values in _changed(config).items()]
    tables.append(Table("Arguments that are not the default", changed, ("flag", "value", "default")))
    everything = [(f"--{name}", _words(value)) for name, value in asdict(config).items()]
    tables.append(Table("All arguments", everything, folded=True))
    tables.append(Table("Environment of this page", environment(), folded=True))
    page = _page().render(
        title=f"DINO run {run.resolve().name}",
        facts=_facts(config, entries),
        notes=notes,
        pictures=pictures,
        neighbours=neighbours,
        neighbours_note=f"{about} A frame: the same class as the first in the row." if about else "",
        neighbours_shown=NEIGHBOURS,
        tables=[table for table in tables if table.rows],
    )
    files.replace(output, lambda file: file.write(page.encode()))


def _page() -> Any:
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=False).from_string(text)


def _arguments(run: Path) -> TrainConfig:
    """Of args.json. Raises UserError where there is none, or what is there is none."""
    path = run / "args.json"
    if not path.is_file():
        raise UserError(f"no run in {run}: there is no args.json")
    try:
        given = json.loads(path.read_text())
        names = {f.name for f in fields(TrainConfig)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}
        return TrainConfig(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no arguments of a run: {error}") from error


def _source(config: TrainConfig, data_path: str | None) -> ImageSource:
    path, wanted = data_path or config.val_path or config.data_path, config.image_format
    return converted(load_digits()[1], wanted) if path is None else open_images(path, wanted)


@dataclass(frozen=True)
class _LookedAt:
    """Some images of a run through its backbone. kept: (M,) indices. features: (M, D), unit length."""

    source: ImageSource
    backbone: Any
    view: View
    kept: NDArray[np.int64]
    features: torch.Tensor
    bad: list[str]

    @classmethod
    def of(cls, run: Path, config: TrainConfig, source: ImageSource, n_images: int, device: str) -> "_LookedAt":
        checkpoint = load_checkpoint(run / "checkpoint.pth")
        backbone = any_backbone_of(checkpoint, run / "checkpoint.pth", "teacher").to(device)
        indices = np.unique(np.linspace(0, len(source) - 1, min(n_images, len(source))).astype(np.int64))
        bad: list[str] = []
        view = View(*config.eval_size)
        found = list(stream(backbone, source, indices, view, num_workers=2, bad=lambda _, line: bad.append(line)))
        if not found:
            raise UserError(f"none of the images could be read: {source.describe()}")
        features = torch.cat([values["cls"] for _, values in found]).cpu()
        kept = np.concatenate([index for index, _ in found])
        return cls(source, backbone, view, kept, torch.nn.functional.normalize(features, dim=1), bad)

    def _shown(self) -> NDArray[np.int64]:
        """Positions among the kept ones, evenly spread, so that several classes are among them."""
        return np.unique(np.linspace(0, len(self.kept) - 1, min(SHOWN, len(self.kept))).astype(int))

    def _seen(self, at: int) -> NDArray[np.uint8]:
        return self.view(read_pixels(self.source, int(self.kept[at])))

    def pictures(self, notes: list[str]) -> list[Picture]:
        """Attention and components of the shown images."""
        if not isinstance(self.backbone, VisionTransformer):
            notes.append(
                f"No attention, no components: {type(self.backbone).__name__} is no Vision Transformer of ours"
            )
            return []
        names = row_labels([self.source.name(int(self.kept[at])) for at in self._shown()])
        views = [self._seen(at) for at in self._shown()]
        looked = [look(self.backbone, name, view) for name, view in zip(names, views)]
        caption = "Where the CLS token of the last block looks, head by head."
        made = [Picture("Attention", caption, _png(attention_figure(looked)))]
        try:
            colors = patch_colors([patch_tokens(self.backbone, view) for view in views])
        except (UserError, ValueError) as error:
            notes.append(f"No principal components: {error}")
            return made
        caption = "Patches by their three main components over all these images; the background is black."
        return [*made, Picture("Principal components", caption, _png(pca_figure(names, views, colors)))]

    def neighbours(self) -> list[list[Cell]]:
        """A row for each shown image: itself, and those next to it."""
        rows = []
        for at in self._shown():
            cosines = self.features @ self.features[at]
            cosines[at] = 2  # itself comes first
            nearest = cosines.topk(min(NEIGHBOURS + 1, len(self.kept)))
            rows.append([self._cell(int(i), at, float(c)) for c, i in zip(nearest.values, nearest.indices)])
        return rows

    def _cell(self, i: int, query: int, cosine: float) -> Cell:
        index, labels = int(self.kept[i]), self.source.labels
        is_same = labels is not None and labels[index] == labels[self.kept[query]]
        word = self.source.classes[labels[index]] if labels is not None else Path(self.source.name(index)).name
        picture = Image.fromarray(in_colors(self._seen(i))).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        picture.save(file, "jpeg", quality=85)
        kind = "query" if i == query else "same" if is_same else "other"
        caption = word if i == query else f"{word} {cosine:.3f}"
        return Cell(kind, self.source.name(index), caption, _uri(file.getvalue(), "image/jpeg"))

    def votes(self) -> dict[str, float]:
        """k-NN accuracy of the looked-at images, leave-one-out; nothing without labels."""
        if self.source.labels is None or len(self.kept) < 2:
            return {}
        bank = Features(self.features, torch.from_numpy(self.source.labels[self.kept]))
        of = f"{len(self.kept):,} images, leave-one-out"
        return {f"{k}-NN|{of}": knn_accuracy(bank, None, k) for k in KS if k < len(self.kept)}


def _evaluations(
    run: Path, entries: Sequence[Mapping[str, Any]], numbers: Mapping[str, float]
) -> list[tuple[str, str, str]]:
    """What training said last, what this page found, and what commands added with --json to files in the folder."""
    rows = []
    for name in EVALUATIONS:
        for entry in [e for e in entries if e.get(name) is not None][-1:]:
            rows.append((TITLES.get(name, name), f"{entry[name]:.4f}", f"training, epoch {entry['epoch'] + 1}"))
    rows += [(name.partition("|")[0], f"{value:.4f}", name.partition("|")[2]) for name, value in numbers.items()]
    for path in sorted(run.glob("*.jsonl")):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(json.JSONDecodeError, AttributeError):
                entry = json.loads(line)
                told = f"{entry.get('weights')}, {entry.get('data')} ({path.name})"
                values = ((k, v) for k, v in entry.items() if isinstance(v, float))
                rows += [(f"{entry.get('evaluation')}: {k}", f"{v:.4f}", told) for k, v in values]
    return rows


def _changed(config: TrainConfig) -> dict[str, tuple[str, str]]:
    """Flag -> (value, default)."""
    pairs = ((f.name, getattr(config, f.name), f.default) for f in fields(TrainConfig))
    return {f"--{name}": (_words(value), _words(default)) for name, value, default in pairs if value != default}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _facts(config: TrainConfig, entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    facts = [("architecture", f"{config.arch}/{config.patch_size}"), ("images", config.data_path or "digits")]
    facts.append(("epochs", f"{entries[-1]['epoch'] + 1 if entries else 0} of {config.epochs}"))
    knn = [entry["knn"] for entry in entries if entry.get("knn") is not None]
    if knn:
        before = entries[0].get("knn_before")
        facts.append(("k-NN", f"{before:.3f} → {knn[-1]:.3f}" if before is not None else f"{knn[-1]:.3f}"))
    if entries:
        facts.append(("loss", f"{entries[0]['train_loss']:.3f} → {entries[-1]['train_loss']:.3f}"))
    return [*facts, ("fastdino", __version__)]


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _svg(figure: Figure) -> str:
    return _drawn(figure, "svg", "image/svg+xml")


def _png(figure: Figure) -> str:
    return _drawn(figure, "png", "image/png")


def _drawn(figure: Figure, ending: str, kind: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format=ending)
    return _uri(file.getvalue(), kind)
