"""The report of a run: whole, safe, bounded, and made of whatever files there are."""

import html.parser
import io
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from jmoe.monitor import balance_log, report_balance
from jmoe.monitor.balance_log import BalanceLog
from jmoe.monitor.metrics_log import MetricsLog
from jmoe.monitor.report import write_picture, write_report
from jmoe.monitor.report_curves import noisy_line
from jmoe.monitor.run_files import evenly

VOID = {"meta", "img", "br"}
METRICS = {
    "loss": 3.0,
    "mtp_loss": [3.5],
    "grad_norm": 1.0,
    "learning_rate": 1e-3,
    "bias_rate": 0.0,
    "tokens": 4096,
    "tokens_per_second": 45e3,
    "step_seconds": 0.1,
    "max_vio": 0.5,
    "max_vio_L": [0.25, 0.75],
    "max_vio_p95": 0.725,
    "dead_experts_L": [0, 3],
    "drop_rate_L": [0.0, 0.125],
}
EVALUATION = {
    "val_loss": 3.1,
    "val_perplexity": 22.2,
    "global_max_vio": 0.0625,
    "global_max_vio_p50": 0.0625,
    "global_max_vio_p95": 0.118,
    "global_max_vio_max": 0.125,
}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed, and collects what the tests ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def _write_run(run_dir: pathlib.Path, *, logs: int) -> None:
    generator = np.random.default_rng(0)
    with MetricsLog(run_dir, start_step=0) as log:
        for step in range(1, logs + 1):
            load_LE = generator.dirichlet(np.ones(8), size=2)
            log.log(step, METRICS, load_LE=load_LE, bias_LE=load_LE - 1 / 8)
        log.log(logs, EVALUATION)
    info = {"command": "train <b>", "versions": {"jax": "0.0"}, "unigram_entropy": 5.5}
    info |= {"parameters": 2_000_000, "active_parameters": 1_000_000}
    (run_dir / "run.json").write_text(json.dumps([info]))
    (run_dir / "config.json").write_text(json.dumps({"name": "a & b"}))
    sample = {"step": 1, "prompt": "if a <", "text": "</pre><script>x()</script>\x00"}
    (run_dir / "samples.jsonl").write_text(json.dumps(sample) + "\n")


def _read_report(run_dir: pathlib.Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_report_is_a_whole_page_that_needs_nothing_else(tmp_path):
    _write_run(tmp_path, logs=20)
    page = _read_report(tmp_path)
    assert page.attributes("html") == [{"lang": "en"}]
    assert len(page.attributes("title")) == 1
    assert len(page.ids) == len(set(page.ids))
    assert all(image["alt"] for image in page.attributes("img"))
    assert all(svg["role"] == "img" for svg in page.attributes("svg"))
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "not recorded" not in page.text


def test_text_from_the_run_is_shown_and_never_interpreted(tmp_path):
    _write_run(tmp_path, logs=2)
    page = _read_report(tmp_path)
    assert not page.attributes("script")
    assert "if a <</pre><script>x()</script>\N{REPLACEMENT CHARACTER}" in page.text
    assert "train <b>" in page.text
    assert "jmoe: a & b" in page.text


def test_a_run_that_logged_once_has_a_report(tmp_path):
    _write_run(tmp_path, logs=1)
    assert "MoE layer 1 batch MaxVio 0.75, 3 dead, 12.5% dropped" in " ".join(
        _read_report(tmp_path).text.split()
    )


def test_the_spread_over_layers_is_told_and_drawn(tmp_path):
    _write_run(tmp_path, logs=2)
    shown = " ".join(_read_report(tmp_path).text.split())
    assert (
        "the median of global MaxVio is 0.062, the 95th percentile 0.118 and the "
        "largest 0.125."
    ) in shown
    assert "95th percentile of layers" in shown


def _lend(run_dir: pathlib.Path, lent_NPP: list[np.ndarray]) -> None:
    with MetricsLog(run_dir, start_step=0) as log:
        for step, lent_PP in enumerate(lent_NPP, start=1):
            lent_L = np.array([lent_PP.sum(), 0])
            metrics = {"experts_lent_L": lent_L, "rows_left_over_L": [8, 0]}
            metrics |= {"device_max_vio_L": [0.5, 1.5], "bytes_lent_L": 5e5 * lent_L}
            metrics |= {"device_max_vio_lent_L": [0.0, 0.25], "lent_PP": lent_PP}
            log.log(step, metrics)


def test_loans_are_told_and_drawn_by_thirds_of_the_run_and_by_device(tmp_path):
    third_PP = np.zeros((4, 4), int)
    third_PP[2, [0, 1]] = 6, 2
    _lend(tmp_path, [third_PP.T] * 4 + [0 * third_PP] * 4 + [third_PP] * 4)
    page = _read_report(tmp_path)
    shown = " ".join(page.text.split())
    for said in (
        "lowered it from 1.000 to 0.125, by 2.7 loans a layer and step.",
        "weights were 2.7 MB a step in all layers.",
        "none 6 experts",
        "Step 1 to 4 device 0 lends 75%, device 2 borrows 100%",
        "Step 5 to 8 nothing was lent",
        "Step 9 to 12 device 2 lends 100%, device 0 borrows 75%",
    ):
        assert said in shown
    maps = [svg for svg in page.attributes("svg") if "who lent" in str(svg)]
    assert len(maps) == 3 and len(page.attributes("image")) == 3
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("loans", [0, 1])
def test_lending_has_a_section_only_where_something_was_lent(tmp_path, loans):
    _lend(tmp_path, [np.full((2, 2), loans)])
    assert ("Lending of experts" in _read_report(tmp_path).text) == bool(loans)


def test_a_run_whose_mesh_changed_shows_the_loans_between_its_last_devices(tmp_path):
    _lend(tmp_path, [np.ones((4, 4)), np.ones((2, 2)), np.ones((2, 2))])
    shown = _read_report(tmp_path).text
    assert "Step 1" not in shown and "Step 2" in shown and "Step 3" in shown


FILES = ["metrics.jsonl", "balance.npy", "samples.jsonl", "run.json", "config.json"]


@pytest.mark.parametrize("name", FILES)  # whole, they leave nothing unrecorded
def test_a_missing_file_reads_not_recorded(tmp_path, name):
    _write_run(tmp_path, logs=2)
    (tmp_path / name).unlink()
    assert "not recorded" in _read_report(tmp_path).text


def test_files_cut_short_are_as_good_as_none(tmp_path):
    empty = _read_report(tmp_path).text
    for name in FILES:
        (tmp_path / name).write_text('{"step": 1, "lo')
    assert _read_report(tmp_path).text == empty
    assert tmp_path.name in empty and empty.count("not recorded") > len(FILES)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    for write in (write_report, lambda path: write_picture(path, tmp_path / "x.png")):
        with pytest.raises(FileNotFoundError, match="run_dir='.*nowhere'"):
            write(tmp_path / "nowhere")


def test_a_diverged_run_says_when_it_diverged(tmp_path):
    broken = {key: np.full(np.shape(METRICS[key]), np.nan) for key in METRICS}
    broken |= {"tokens": 1, "step_seconds": 0.1, "val_loss": np.inf}
    load_LE = np.full((2, 4), np.nan)
    with MetricsLog(tmp_path, start_step=0) as log:
        for step in (7, 8):
            log.log(step, broken, load_LE=load_LE, bias_LE=load_LE)
    assert "First not finite at step 7." in _read_report(tmp_path).text
    write_picture(tmp_path, tmp_path / "picture.png")


@pytest.mark.parametrize("layers, experts, logs", [(60, 256, 200), (26, 64, 1000)])
def test_a_big_model_has_a_report_below_a_megabyte_and_a_half(
    tmp_path, monkeypatch, layers, experts, logs
):
    monkeypatch.setattr(balance_log, "_BYTES_A_LOG", 1 << 20)
    generator = np.random.default_rng(0)
    log = BalanceLog(tmp_path / "balance.npy", start_step=0)
    for step in range(1, logs + 1):
        # Incompressible: far from balance, and every log unlike the one before.
        load_LE = generator.uniform(0, 2 / experts, (layers, experts))
        log.append(step, load_LE, generator.uniform(-1, 1, (layers, experts)))
    log.close()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1000):
            row = {"step": step} | METRICS | {"loss": generator.normal()}
            for key in ("max_vio_L", "dead_experts_L", "drop_rate_L"):
                row[key] = generator.uniform(0, 1, layers).round(3).tolist()
            file.write(json.dumps(row) + "\n")
    assert write_report(tmp_path).stat().st_size < 1.5e6


def test_a_long_run_is_thinned_to_logs_that_span_it(tmp_path):
    _write_run(tmp_path, logs=1)
    (tmp_path / "balance.npy").unlink()
    log = BalanceLog(tmp_path / "balance.npy", start_step=0)
    for step in range(3, 2000):
        log.append(step, np.full((2, 8), 1 / 8), np.zeros((2, 8)))
    log.close()
    assert "one of 400 logs,\nfrom step 3 to 1,999" in _read_report(tmp_path).text


@pytest.mark.parametrize("logs", [0, 1, 30])
def test_the_picture_is_1600_pixels_wide_whatever_was_recorded(tmp_path, logs):
    if logs:
        _write_run(tmp_path, logs=logs)
    path = write_picture(tmp_path, tmp_path / "picture.png", layer=1)
    with Image.open(path) as image:
        assert image.size[0] == 1600


def test_a_picture_of_a_layer_that_is_not_there_is_refused(tmp_path):
    _write_run(tmp_path, logs=1)
    with pytest.raises(ValueError, match="layer=2 must be from 0 to 1"):
        write_picture(tmp_path, tmp_path / "picture.png", layer=2)


def test_overload_is_red_idleness_blue_the_fair_share_grey_and_the_unknown_darker():
    load_NE = np.array([[0.0, 1.0, 2.0, np.nan], [0.0, 1.0, 9.0, np.nan]])
    image = Image.open(io.BytesIO(report_balance.load_png(load_NE))).convert("RGB")
    assert image.size == (2, 4)
    pixels = np.asarray(image).astype(int)
    np.testing.assert_array_equal(pixels[:, 0], pixels[:, 1])
    (idle, fair, over, unknown) = pixels[:, 0]
    assert idle[2] > 2 * idle[0] and over[0] > 2 * over[2]
    assert np.ptp(fair) <= 1 and fair.min() > 240
    assert np.ptp(unknown) == 0 and unknown.max() < 200


def test_smoothing_keeps_a_straight_line_and_bridges_what_is_not_finite():
    step_N = np.arange(400)
    value_N = 2.0 * step_N
    value_N[100] = np.nan
    axes = Figure().add_subplot()
    noisy_line(axes, step_N, value_N, "blue", "loss")
    raw, smooth = (np.asarray(line.get_ydata(), float) for line in axes.lines)
    assert np.isnan(raw[100])
    inside = slice(120, 380)  # away from the gap and the ends
    np.testing.assert_allclose(smooth[inside], value_N[inside], rtol=1e-6)
    np.testing.assert_allclose(smooth[100], 200.0, rtol=1e-6)


@given(st.integers(1, 5000), st.integers(2, 500))
def test_what_is_kept_of_a_run_is_distinct_spread_and_has_both_ends(num_items, limit):
    kept = evenly(num_items, limit)
    assert len(kept) == min(num_items, limit)
    assert (kept[0], kept[-1]) == (0, num_items - 1)
    gaps = np.diff(kept)
    assert np.all(gaps > 0) and np.ptp(gaps) <= 1 if len(gaps) else num_items == 1
