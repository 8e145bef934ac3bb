"""What a training run shows in the terminal: a header, a live line, a final table.

Where nobody watches (a pipe, a file, a notebook, CI) the live line becomes a plain line
every few logs. Of a run's processes, one makes a `Console`.
"""

import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table
from rich.markup import escape

from jmoe.data.formatting import count, duration
from jmoe.data.progress import live_line
from jmoe.monitor import run_files

# How each metric reads in the progress line and in the line an evaluation leaves.
_PROGRESS: dict[str, Callable[[float], str]] = {
    "tokens_per_second": lambda value: f"{count(value):>6} [dim]tok/s[/dim]",
    "loss": lambda value: f"[dim]loss[/dim] {value:.4f}",
    "max_vio": lambda value: f"[dim]MaxVio[/dim] {value:.3f}",
    "skipped": lambda value: f"[red]skipped {value}[/red]" if value else "",
    "rolled_back": lambda value: f"[red]rolled back {value}[/red]" if value else "",
}
_EVALUATION: dict[str, Callable[[float], str]] = {
    "val_loss": lambda value: f"[dim]validation loss[/dim] {value:.4f}",
    "val_perplexity": lambda value: f"[dim]perplexity[/dim] {value:.2f}",
    "global_max_vio": lambda value: f"[dim]global MaxVio[/dim] {value:.3f}",
}


class Console:
    """Shows a run's progress from `start_step` to `total_steps`.

    A context manager: leaving it gives the terminal back, whatever happened inside.

    Args:
      total_steps: the step that ends the run.
      start_step: the step that training goes on from, 0 for a new run.
      plain_every: without a live line, the number of logs for one plain line.
      followers: are called with the text of every note.
      out: where to write, by default standard output.
      clock: seconds since some fixed moment.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        plain_every: int = 10,
        followers: Sequence[Callable[[str], None]] = (),
        out: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._out = out or rich.console.Console(highlight=False)
        self._total_steps = total_steps
        self._plain_every = plain_every
        self._followers = followers
        self._clock = clock
        self._started = clock()
        self._first_log: tuple[int, float] | None = None  # step and time
        self._num_logs = 0
        self._latest: dict[str, Any] = {}
        self._speeds: list[float] = []
        self._live = None
        if self._out.file.isatty() and not self._out.is_dumb_terminal:
            self._live = live_line(self._out)
            text = f"{self._position(start_step)}  [dim]compiling[/dim]"
            self._live.add_task("", total=total_steps, completed=start_step, text=text)

    def __enter__(self) -> "Console":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def header(
        self,
        *,
        name: str,
        parameters: int,
        active_parameters: int,
        tokens_per_step: int,
        device: str,
        run_dir: str | pathlib.Path,
        lending: str = "",
        page: str = "",
    ) -> None:
        """Says what is trained, on what and where, and what else there is.

        Args:
          lending: how devices lend each other experts.
          page: the address where the run is shown live.
        """
        active = f"{count(active_parameters)} active per token"
        self._out.print(f"\n[bold]jmoe[/bold] [bold cyan]{escape(name)}[/bold cyan]")
        self._print_pairs(
            ("parameters", f"{count(parameters)}, {active}"),
            ("tokens per step", f"{tokens_per_step:,}"),
            ("device", device),
            *([("lending", lending)] if lending else []),
            ("run directory", str(run_dir)),
            *([("live page", page)] if page else []),
        )

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows what was logged at `step`: numbers on the host, by their usual keys.

        An evaluation (`val_loss`) gets a line of its own that stays.
        """
        self._latest |= metrics
        if "tokens_per_second" in metrics:
            self._speeds.append(float(metrics["tokens_per_second"]))
        if "loss" in metrics:
            self._show_progress(step)
        if "val_loss" in metrics:
            self._print_line([self._position(step), *_read(_EVALUATION, metrics)])

    def note(self, text: str) -> None:
        """Leaves a line of text that stays, say that a checkpoint was saved."""
        self._print_line([escape(text)])
        for follow in self._followers:
            follow(text)

    def finish(
        self, run_dir: str | pathlib.Path, *, unigram_entropy: float | None = None
    ) -> None:
        """Ends the live line and prints the final table.

        Args:
          run_dir: where the run's files are.
          unigram_entropy: of the corpus, in nats a token: the loss of a model that
            knows how frequent each token is and nothing else.
        """
        if self._live:
            self._live.stop()
        table = rich.table.Table.grid(padding=(0, 3))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", style="bold", no_wrap=True)
        table.add_column(style="dim")
        for row in self._results(unigram_entropy):
            table.add_row(*row)
        self._out.print("", table, "")
        directory = pathlib.Path(run_dir)
        self._print_pairs(
            ("report", str(directory / run_files.REPORT)),
            ("metrics", str(directory / run_files.METRICS)),
            ("TensorBoard", f"tensorboard --logdir {directory}"),
        )

    def _show_progress(self, step: int) -> None:
        if self._first_log is None:
            self._first_log = step, self._clock()
        self._num_logs += 1
        left = f"{self._time_left(step)} [dim]left[/dim]"
        parts = [self._position(step), *_read(_PROGRESS, self._latest), left]
        if self._live:
            task = self._live.task_ids[0]
            self._live.update(task, completed=step, text="  ".join(parts))
            return
        is_end = self._num_logs == 1 or step >= self._total_steps
        if is_end or self._num_logs % self._plain_every == 0:
            self._print_line(parts)

    def _position(self, step: int) -> str:
        total = str(self._total_steps)
        return f"{step:>{len(total)}}[dim]/{total}[/dim]"

    def _time_left(self, step: int) -> str:
        """Returns the time left, by the pace since the first log.

        Compilation came before that.
        """
        assert self._first_log is not None
        first_step, first_time = self._first_log
        if step <= first_step:
            return "-:--:--"
        pace = (self._clock() - first_time) / (step - first_step)
        return duration(pace * (self._total_steps - step))

    def _results(self, unigram_entropy: float | None) -> Iterator[tuple[str, str, str]]:
        latest = self._latest
        entropy = ""
        if unigram_entropy is not None:
            entropy = f"the corpus's unigram entropy is {unigram_entropy:.4f}"
        if "loss" in latest:
            yield "training loss", f"{latest['loss']:.4f}", ""
        if "val_loss" in latest:
            yield "validation loss", f"{latest['val_loss']:.4f}", entropy
        if "val_perplexity" in latest:
            yield "perplexity", f"{latest['val_perplexity']:.2f}", ""
        if "global_max_vio" in latest:
            vio, worst = latest["global_max_vio"], latest["global_max_vio_max"]
            meaning = (
                f"a busiest expert gets {1 + vio:.2f} times its fair share, "
                f"{1 + worst:.2f} in the worst layer"
            )
            yield "global MaxVio", f"{vio:.3f}", meaning
        if latest.get("skipped"):
            meaning = "steps whose loss or gradients weren't finite, or were spikes"
            yield "skipped", str(latest["skipped"]), meaning
        if latest.get("rolled_back"):
            meaning = "times to a checkpoint, and on without the data after it"
            yield "rolled back", str(latest["rolled_back"]), meaning
        if self._speeds:
            yield "tokens/s", count(statistics.median(self._speeds)), "median"
        yield "time", duration(self._clock() - self._started), ""

    def _print_line(self, parts: list[str]) -> None:
        # Soft wrapping: a pipe has no width that lines would have to keep to.
        self._out.print("  ".join(parts), soft_wrap=True)

    def _print_pairs(self, *pairs: tuple[str, str]) -> None:
        table = rich.table.Table.grid(padding=(0, 3))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in pairs:
            table.add_row(name, escape(value))
        self._out.print(table, "")


def _read(
    readings: Mapping[str, Callable[[float], str]], metrics: Mapping[str, Any]
) -> list[str]:
    """Returns readings that are there, and have something to say."""
    found = (read(metrics[key]) for key, read in readings.items() if key in metrics)
    return list(filter(None, found))
