"""Text sources: from a configured path to the documents behind it."""

import concurrent.futures
import dataclasses
import glob
import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from jmoe.config import checks
from jmoe.config.data import (
    BUILTIN_PATHS,
    DataConfig,
    SourceConfig,
)
from jmoe.data import builtin, cache, digests, readers
from jmoe.data.readers import Piece


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A source that was found: a key that stands for its documents, and their pieces.

    on_corrupt: what becomes of corrupt records, as in `DataConfig`.
    """

    name: str
    fingerprint: str
    text_field: str
    on_corrupt: str
    pieces: Callable[[], list[Piece]]

    def documents(self) -> Iterator[str]:
        """Reads all documents.

        Raises:
          ValueError: as `readers.documents` and `require_text` do.
        """
        found = Counter()
        for piece in self.pieces():
            for document in readers.documents(piece, self.text_field, self.on_corrupt):
                found[piece.path] += 1
                yield document
            found[piece.path] += 0
        self.require_text(found)

    def require_text(self, documents: Mapping[str, int]) -> None:
        """Refuses files of which no document was found, unless all were to be skipped.

        Args:
          documents: how many were found in each file.

        Raises:
          ValueError: names the file, or the source if it has none at all.
        """
        empty = [path for path, count in documents.items() if not count]
        if empty and self.on_corrupt == "refuse":
            raise ValueError(f"{empty[0]}: the file holds no text.")
        if len(empty) == len(documents):
            raise ValueError(f"{self.name}: it holds no text.")


def open_sources(cfg: DataConfig) -> list[Text]:
    """Finds the files of every source, and only then reads any of them.

    Fingerprints come from the files' contents. Each file is read for it once, about a
    second for each gigabyte, and again when it has changed (`jmoe.data.digests`).

    Raises:
      FileNotFoundError: a file doesn't exist, or a glob matches none.
      ValueError: a file is empty or of an unknown kind.
    """
    files = [_find(source.path) for source in cfg.sources]
    return [
        _from_files(source, paths, cfg)
        if paths
        else _from_builtin(source, cfg.on_corrupt)
        for source, paths in zip(cfg.sources, files, strict=True)
    ]


def document_hash(document: str) -> int:
    """Returns 64 bits, uniform, and the same for the same text wherever it is."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _find(path: str) -> list[pathlib.Path]:
    """Returns a path's files, in a fixed order; none for the embedded corpus."""
    if path in BUILTIN_PATHS:
        return []
    pattern = checks.local_path("path", path)
    if pattern.exists():
        paths = [pattern]
    else:
        literal = next(parent for parent in pattern.parents if parent.exists())
        rest = str(pattern.relative_to(literal))
        found = glob.glob(rest, root_dir=literal, recursive=True)
        paths = sorted(literal / name for name in found)
    if not paths:
        raise FileNotFoundError(f"No file matches the source path {path!r}.")
    for file in paths:
        readers.suffix(file)
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: the file is empty.")
    return paths


def _from_builtin(source: SourceConfig, on_corrupt: str) -> Text:
    return Text(
        name=source.path,
        fingerprint=builtin.fingerprint(builtin.domains(source.path)),
        text_field=source.text_field,
        on_corrupt=on_corrupt,
        pieces=lambda: [Piece(source.path, "builtin")],
    )


def _from_files(
    source: SourceConfig, paths: list[pathlib.Path], cfg: DataConfig
) -> Text:
    kinds, directory = map(readers.suffix, paths), cache.directory(cfg)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        contents = pool.map(lambda path: digests.sha256(path, directory), paths)
        fingerprint = cache.key(source.text_field, *kinds, *contents)
    return Text(
        name=source.path,
        fingerprint=fingerprint,
        text_field=source.text_field,
        on_corrupt=cfg.on_corrupt,
        pieces=lambda: [piece for path in paths for piece in readers.pieces(path)],
    )
