"""What the terminal shows, with and without somebody watching."""

import io

import pytest
import rich.console
import rich.text

from jmoe.data.formatting import count, duration
from jmoe.monitor.console import Console

METRICS = {"loss": 2.5, "max_vio": 0.25, "tokens_per_second": 45_200.0}
EVALUATION = {
    "val_loss": 2.75,
    "val_perplexity": 15.64,
    "global_max_vio": 0.05,
    "global_max_vio_max": 0.125,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _plain(file: io.StringIO, width: int = 80) -> rich.console.Console:
    return rich.console.Console(file=file, width=width, highlight=False)


def _show_header(console: Console, *, name: str, **more: str) -> None:
    console.header(
        name=name,
        parameters=1_934_848,
        active_parameters=934_123,
        tokens_per_step=4096,
        device="cpu",
        run_dir="runs/tiny",
        **more,
    )


def test_a_pipe_gets_one_plain_line_for_every_few_logs():
    file = io.StringIO()
    with Console(100, plain_every=4, out=_plain(file)) as console:
        for step in range(10, 101, 10):
            console.update(step, METRICS)
    lines = file.getvalue().splitlines()
    assert [line.split("/")[0].strip() for line in lines] == ["10", "40", "80", "100"]
    assert "\x1b" not in file.getvalue()
    assert "45.2k tok/s  loss 2.5000  MaxVio 0.250" in lines[0]


@pytest.mark.parametrize("width", [20, 80])
def test_a_plain_line_is_never_broken_to_fit_a_width(width):
    file = io.StringIO()
    with Console(1_000_000, out=_plain(file, width)) as console:
        console.update(10, METRICS)
        console.update(10, EVALUATION)
    assert len(file.getvalue().splitlines()) == 2


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_a_live_line_that_fits_its_width(width):
    file = Terminal()
    out = rich.console.Console(file=file, force_terminal=True, width=width)
    with Console(20_000, out=out) as console:
        console.update(10_000, METRICS)
    frame = [line for line in file.getvalue().splitlines() if "tok/s" in line][-1]
    text = rich.text.Text.from_ansi(frame).plain
    assert "10000/20000   45.2k tok/s  loss 2.5000  MaxVio 0.250  -:--:-- left" in text
    assert len(text) == width
    assert file.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_the_terminal_is_given_back_after_an_error():
    file = Terminal()
    out = rich.console.Console(file=file, force_terminal=True, width=80)
    with pytest.raises(KeyboardInterrupt), Console(10, out=out):
        raise KeyboardInterrupt
    assert file.getvalue().endswith("\x1b[?25h")


def test_the_time_left_follows_the_pace_since_the_first_log():
    file = io.StringIO()
    seconds = iter([0.0, 100.0, 120.0])  # start; first log, after compiling; second
    with Console(
        50, start_step=0, plain_every=1, out=_plain(file), clock=lambda: next(seconds)
    ) as console:
        console.update(10, METRICS)
        console.update(20, METRICS)
    first, second = file.getvalue().splitlines()
    assert first.endswith("-:--:-- left")
    assert second.endswith("0:01:00 left")


def test_the_header_and_the_final_table_say_what_was_trained_and_how_it_went():
    file = io.StringIO()
    with Console(10, out=_plain(file)) as console:
        _show_header(console, name="tiny")
        console.update(10, METRICS | EVALUATION)
        console.finish("runs/tiny", unigram_entropy=5.6123)
    shown = " ".join(file.getvalue().split())
    for expected in (
        "jmoe tiny parameters 1.9M, 934.1k active per token tokens per step 4,096",
        "validation loss 2.7500 the corpus's unigram entropy is 5.6123",
        "global MaxVio 0.050 a busiest expert gets 1.05 times its fair share, 1.12 in",
        "report runs/tiny/report.html",
    ):
        assert expected in shown


def test_the_header_says_where_the_live_page_is():
    file = io.StringIO()
    with Console(10, out=_plain(file)) as console:
        _show_header(console, name="tiny", page="http://127.0.0.1:8265/")
    assert "live page         http://127.0.0.1:8265/" in file.getvalue()


def test_notes_are_passed_on_as_they_are():
    noted = []
    with Console(10, out=_plain(io.StringIO()), followers=[noted.append]) as console:
        console.note("Saved [step] 10.")
    assert noted == ["Saved [step] 10."]


@pytest.mark.parametrize("lending", ["", "up to 4 experts"])
def test_the_header_speaks_of_lending_where_devices_lend(lending):
    file = io.StringIO()
    with Console(10, out=_plain(file)) as console:
        _show_header(console, name="tiny", lending=lending)
    shown = " ".join(file.getvalue().split())
    between = f"lending {lending} " if lending else ""
    assert f"device cpu {between}run directory" in shown


def test_the_final_table_of_a_run_without_steps_has_no_results():
    file = io.StringIO()
    with Console(10, start_step=10, out=_plain(file)) as console:
        console.finish("runs/tiny")
    assert "loss" not in file.getvalue()
    assert "runs/tiny/metrics.jsonl" in file.getvalue()


@pytest.mark.parametrize(
    ("key", "name", "meaning"),
    [
        ("skipped", "skipped", "steps whose loss or gradients weren't finite"),
        ("rolled_back", "rolled back", "times to a checkpoint, and on without the"),
    ],
)
def test_steps_that_did_not_numberare_shown_where_there_are_any(key, name, meaning):
    shown = []
    for number in (0, 3):
        file = io.StringIO()
        with Console(10, out=_plain(file)) as console:
            console.update(10, METRICS | {key: number})
            console.finish("runs/tiny")
        shown.append(file.getvalue())
    assert name not in shown[0]
    line, *_, table = shown[1].partition("\n")
    assert f"MaxVio 0.250  {name} 3  " in line
    assert meaning in table


def test_square_brackets_are_text_and_not_markup():
    file = io.StringIO()
    with Console(10, out=_plain(file)) as console:
        _show_header(console, name="run [bold]")
        console.note("saved [red]step 5")
    assert "run [bold]" in file.getvalue()
    assert "saved [red]step 5" in file.getvalue()


@pytest.mark.parametrize(
    ("number", "text"),
    [(792, "792"), (4096, "4,096"), (45_230, "45.2k"), (193.5e6, "193.5M")]
    + [(671.03e9, "671.0B"), (14.8e12, "14.8T"), (float("nan"), "nan")],
)
def test_counts_read_like_a_model_card(number, text):
    assert count(number) == text


def test_durations_read_like_a_clock():
    assert duration(151.4) == "0:02:31"
