"""The embedded corpus: text that every Python installation already holds.

Code is the standard library's source without its docstrings; prose is those docstrings
and the language reference behind `help()`; arithmetic is generated. Code and prose
share no text, so what validates one is never trained on in the other. Nothing is
downloaded, and the same Python gives the same documents in the same order.
"""

import ast
import functools
import os
import pathlib
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterator

from jmoe.config.data import BUILTIN_DOMAINS
from jmoe.data import arithmetic, cache

# Tests and other people's packages aren't installed everywhere, the encodings are
# tables, and the topics of `help()` are read as prose.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_SKIPPED |= {"encodings", "pydoc_data", "__pycache__"}
# Written when Python was built: they describe one machine.
_GENERATED = ("_sysconfigdata", "config-")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents(domains: tuple[str, ...] = BUILTIN_DOMAINS) -> Iterator[str]:
    """Yields the documents of these domains, one domain after the other."""
    for domain in domains:
        yield from _DOMAINS[domain]()


def domains(path: str) -> tuple[str, ...]:
    """Returns the domains that a path means: "builtin" all, "builtin:code" one."""
    domain = path.partition(":")[2]
    return (domain,) if domain else BUILTIN_DOMAINS


def fingerprint(domains: tuple[str, ...] = BUILTIN_DOMAINS) -> str:
    """Returns a key that changes whenever these domains' documents may change."""
    recipe = [pathlib.Path(file) for file in (__file__, arithmetic.__file__)]
    contents = (path.read_bytes() for path in [*recipe, *_library_files()])
    return cache.key(sys.version, *domains, *contents)


def split_docstrings(name: str, source: str) -> tuple[str, str]:
    """Takes a module apart into code and documentation.

    Args:
      name: the module's dotted name, which heads its documentation.
      source: Python source.

    Returns:
      The source without docstrings, still valid Python; and the docstrings in order,
      each under the dotted name of what it describes. A docstring that shares a line
      with code stays in the code.
    """
    lines = source.split("\n")
    described = []
    # From the end, so that the line numbers still to come stay right.
    for dotted, definition in reversed(list(_documented(name, ast.parse(source)))):
        docstring = definition.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or 0) - 1
        before = lines[first].encode()[: docstring.col_offset].decode()
        after = lines[last].encode()[docstring.end_col_offset :].decode()
        if before.strip() or after.strip():
            continue
        described.append(f"{dotted}\n\n{ast.get_docstring(definition)}")
        only_a_docstring = len(definition.body) == 1
        lines[first : last + 1] = [f"{before}pass"] if only_a_docstring else []
    return "\n".join(lines).strip("\n"), "\n\n".join(reversed(described))


def _documented(name: str, node: Definition) -> Iterator[tuple[str, Definition]]:
    """Yields the definitions that have a docstring, under their dotted names."""
    if ast.get_docstring(node, clean=False) is not None:
        yield name, node
    for child in node.body:
        if isinstance(child, Definition):
            yield from _documented(f"{name}.{child.name}", child)


@functools.cache
def _modules() -> tuple[tuple[str, str], ...]:
    """Returns code and documentation of every module of the standard library."""
    return tuple(
        split_docstrings(name, path.read_text(encoding="utf-8"))
        for path, name in _library_files().items()
    )


@functools.cache
def _library_files() -> dict[pathlib.Path, str]:
    """Returns the library's source files, sorted, and their dotted module names."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    found = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        for path in (pathlib.Path(folder, name) for name in files):
            parts = path.relative_to(root).with_suffix("").parts
            if path.suffix == ".py" and not parts[0].startswith(_GENERATED):
                found[path] = ".".join(parts).removesuffix(".__init__")
    return dict(sorted(found.items()))


def _topics() -> Iterator[str]:
    """Yields the topics of `help()`, less those that a longer one repeats."""
    seen = set()
    for topic in sorted(pydoc_data.topics.topics.values(), key=len, reverse=True):
        paragraphs = {part for part in topic.split("\n\n") if len(part) > 80}
        if len(paragraphs & seen) <= len(paragraphs) / 2:
            yield topic
        seen |= paragraphs


def _code() -> Iterator[str]:
    return (code for code, _ in _modules() if code)


def _prose() -> Iterator[str]:
    yield from (prose for _, prose in _modules() if prose)
    yield from _topics()


_DOMAINS = {"code": _code, "prose": _prose, "arithmetic": arithmetic.documents}
