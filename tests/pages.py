"""The documentation's pages, taken apart into what can be checked."""

import functools
import pathlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4,}\S.*\n)(?:^ {4,}.*\n|^\n(?= {4,}\S))*", re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Code(NamedTuple):
    """A block of code; language: "python", or "" of what a shell is told."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that a Python block is, or is a part of, by its first line."""
        found = re.match(r"# (?:in )?([\w/]+\.py)\n", self.text)
        return found and found[1]

    @property
    def is_session(self) -> bool:
        """Whether it shows what a command answers."""
        return self.text.startswith("$ ")


class Figures(NamedTuple):
    """A row of a table of figures: what its numbers are, and what measured them."""

    what: str
    numbers: list[str]
    command: str


@functools.cache
def read(page: pathlib.Path) -> str:
    return page.read_text(encoding="utf-8")


def links(page: pathlib.Path) -> list[str]:
    """Returns the targets of links and pictures that aren't of another site."""
    found = LINK.findall(prose(page))
    return [target for target in found if not target.startswith("https://")]


@functools.cache
def anchors(page: pathlib.Path) -> set[str]:
    """Returns what GitHub calls the page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@functools.cache
def blocks(page: pathlib.Path) -> list[Code]:
    """Returns the page's code, in order within each kind: fenced, then indented."""
    fenced = [Code(m[2], textwrap.dedent(m[3])) for m in FENCE.finditer(read(page))]
    rest = FENCE.sub("", read(page))
    return fenced + [Code("", textwrap.dedent(m[0])) for m in INDENTED.finditer(rest)]


@functools.cache
def prose(page: pathlib.Path) -> str:
    """Returns the page without its blocks of code."""
    return INDENTED.sub("", FENCE.sub("", read(page)))


def spans(page: pathlib.Path) -> list[str]:
    """Returns what stands between backticks in a line of text or in a table."""
    found = re.findall(r"`([^`]+)`", prose(page))
    return [re.sub(r"\s+", " ", span) for span in found]


def commands(page: pathlib.Path) -> Iterator[list[str]]:
    """Yields the words of every command that a reader may type."""
    told = [c.text for c in blocks(page) if not c.language and not c.is_session]
    lines = "\n".join(told).replace("\\\n", " ").splitlines()
    for line in [*lines, *filter(_is_command, spans(page))]:
        words: list[str] = []
        for word in shlex.split(line, comments=True):
            if word in ("&&", "|", ";"):
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def _is_command(span: str) -> bool:
    return (
        re.match(r"(python|pip|pytest|scripts/\S+\.sh|\S+/python) ", span) is not None
    )


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """Returns the Python file that a command runs, and what it is told."""
    for number, word in enumerate(words[:-1]):
        if re.fullmatch(r"(\S*/)?python", word) and words[number + 1].endswith(".py"):
            return words[number + 1], words[number + 2 :]
    return None


def figures(page: pathlib.Path) -> Iterator[Figures]:
    """Yields the rows of the page's tables of figures."""
    for table in re.findall(
        r"^\| what \| figure \| command \|\n(.+?)^$", read(page), re.M | re.S
    ):
        command = ""
        for row in table.splitlines()[1:]:
            what, figure, told = (cell.strip() for cell in row.strip("|").split(" | "))
            command = command if told == "the same" else told.strip("` |")
            yield Figures(what, NUMBER.findall(figure), command)


def fields_of(page: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields a record's path and a field of it, of tables headed "field of `path`"."""
    for path, table in re.findall(
        r"^\| field of `([\w.]+)` \|.*\n((?:\|.*\n)+)", prose(page) + "\n", re.M
    ):
        for row in table.splitlines()[1:]:
            for name in re.findall(r"`(\w+)`", row.split(" | ")[0]):
                yield path, name


def numbers_in(value: Any) -> Iterator[float]:
    """Yields every number in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers_in(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def messages(page: pathlib.Path) -> Iterator[list[str]]:
    """Yields the fixed parts of each message in the page's tables of messages.

    What varies is left out: numbers, names in quotes, and three dots.
    """
    for table in re.findall(r"^\| message \|.*\n((?:\|.*\n)+)", prose(page), re.M):
        for row in table.splitlines()[1:]:
            for message in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                parts = re.split(r"\.\.\.|'|\b\d+\b|=", message)
                yield [part.strip() for part in parts if len(part.strip()) > 3]
