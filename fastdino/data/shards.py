"""Files that hold many images: which source reads which."""

from collections.abc import Callable, Sequence

from fastdino.data.parquet import ParquetSource
from fastdino.data.tar import TarSource


def _parquet(files: Sequence[str], extensions: tuple[str, ...]) -> ParquetSource:
    return ParquetSource(files)  # whose images have no names


SHARDS: dict[str, Callable[[Sequence[str], tuple[str, ...]], TarSource | ParquetSource]] = {
    ".tar": TarSource,
    ".parquet": _parquet,
}
