"""Text sources: from a configured path to the documents behind it."""

import concurrent.futures
import dataclasses
import glob
import hashlib
import pathlib
from collections.abc import Callable, Iterator

from jmoe.config import checks
from jmoe.config.data import (
    BUILTIN_DOMAINS,
    BUILTIN_PATHS,
    DataConfig,
    SourceConfig,
)
from jmoe.data import builtin, cache, digests, readers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """A source that was found: its documents, and a key that stands for them."""

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[str]]


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
        _from_files(source, paths, cache.directory(cfg))
        if paths
        else _from_builtin(source)
        for source, paths in zip(cfg.sources, files, strict=True)
    ]


def document_hash(document: str) -> int:
    """64 bits, uniform, and the same for the same text wherever it is found."""
    digest = hashlib.blake2b(document.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _find(path: str) -> list[pathlib.Path]:
    """The files that a path means, in a fixed order; none for the embedded corpus."""
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


def _from_builtin(source: SourceConfig) -> Text:
    domain = source.path.partition(":")[2]
    domains = (domain,) if domain else BUILTIN_DOMAINS
    return Text(
        name=source.path,
        fingerprint=builtin.fingerprint(domains),
        documents=lambda: builtin.documents(domains),
    )


def _from_files(
    source: SourceConfig, paths: list[pathlib.Path], directory: pathlib.Path
) -> Text:
    kinds = map(readers.suffix, paths)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        contents = pool.map(lambda path: digests.sha256(path, directory), paths)
        fingerprint = cache.key(source.text_field, *kinds, *contents)
    return Text(
        name=source.path,
        fingerprint=fingerprint,
        documents=lambda: _documents(paths, source.text_field),
    )


def _documents(paths: list[pathlib.Path], text_field: str) -> Iterator[str]:
    for path in paths:
        yield from readers.documents(path, text_field)
