"""What a suite measured, beside what was asked of it: as JSON and as a table."""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import rich.table

from experiments.benchmarks.workers import cores

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"

_PACKAGES = ("jmoe", "jax", "jaxlib", "flax", "optax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number, with a bound where the project has set itself one.

    `definition` says how the number comes about, for whoever doubts it.
    """

    name: str
    value: float
    unit: str
    definition: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def asked(self) -> str:
        """The bound as people write it; empty without one."""
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return "" if self.at_most is None else f"≤ {self.at_most:g}"

    @property
    def met(self) -> bool | None:
        """None where nothing was asked."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A suite's result; `settings` and `samples` are whatever JSON takes.

    `compared` are the other packages that were measured. `wrong` says, of each result
    that was checked and isn't right, which it is.
    """

    suite: str
    compared: tuple[str, ...]
    settings: dict[str, Any]
    figures: list[Figure]
    samples: dict[str, Any]
    wrong: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """With the machine, versions, commit and date, so that it can be repeated."""
        now = datetime.datetime.now(datetime.UTC)
        return {
            "suite": self.suite,
            "command": shlex.join(["python", *sys.argv]),
            "date": now.isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(*_PACKAGES, *self.compared),
            "settings": self.settings,
            "figures": [
                dataclasses.asdict(figure) | {"met": figure.met}
                for figure in self.figures
            ],
            "samples": self.samples,
            "wrong": list(self.wrong),
        }

    def to_json(self) -> dict[str, Any]:
        """Returns `to_dict` as it is written, without digits that mean nothing."""
        return _rounded(self.to_dict())

    def write(self, directory: pathlib.Path = RESULTS) -> pathlib.Path:
        """Writes `<suite>.json` and returns its path."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.suite}.json"
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return path

    def table(self) -> rich.table.Table:
        """A row a figure: what, unit, asked, measured, met."""
        table = rich.table.Table(title=self.suite, title_justify="left")
        for name in ("figure", "unit"):
            table.add_column(name)
        for name in ("asked", "measured"):
            table.add_column(name, justify="right")
        table.add_column()
        for figure in self.figures:
            verdict = {None: "", True: "[green]met[/]", False: "[red]missed[/]"}
            table.add_row(
                figure.name,
                figure.unit,
                figure.asked,
                significant(figure.value),
                verdict[figure.met],
            )
        return table


def _rounded(value: Any) -> Any:
    """Without the digits that no measurement here has."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def significant(value: float) -> str:
    """Three significant digits, and all those before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """Cores in use, processor, memory in bytes, system."""
    return {
        "cores": cores(),
        "processor": processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }


def processor() -> str:
    """The processor's name as Linux has it, or its architecture."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2] for line in file if line.startswith("model n")]
    return names[0].strip() if names else platform.machine()


def versions(*packages: str) -> dict[str, str | None]:
    """Returns versions of Python and of packages; None of what isn't installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """The commit's hash, with `-dirty` if the files differ from it; or "unknown"."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
