"""The figures of the decoding benchmark, from the turns that sides took."""

import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Picture

from experiments.benchmarks.decode_work import Decoding
from experiments.benchmarks.report import Figure
from experiments.benchmarks.workers import Turn, per_round, ratio

Turns = Mapping[str, Sequence[Turn]]

# The tasks of jmoe's sides that have no other beside them.
TASKS = {
    "requests": ("one_by_one", "together"),
    "context": ("steps",),
    "arrival": ("arrival",),
    "drafts": ("drafts_0", "drafts_1", "drafts_2"),
}
SIDES = {"ours": "jmoe", "vllm": "vLLM", "theirs": "transformers"}
_AT_LEAST = {  # over which side, and at which batches
    ("generate", "theirs"): {1: 2.0, 8: 2.0},
    ("generate", "vllm"): {1: 1.2, 8: 1.2, 32: 1.2},
    ("prefill", "theirs"): {1: 1.5, 8: 1.5, 32: 1.5},
}
_SAME_SHARE = 0.9  # of completions; in the others two tokens were as likely


def side_figures(turns: Turns, decoding: Decoding) -> Iterator[Figure]:
    """Speeds of all sides, and what part of a step reads weights at memory's rate."""
    rates = read_rates(turns)
    yield Figure(
        name="read bandwidth",
        value=_median(rates) / 1e9,
        unit="GB/s",
        definition="of an array of 1 GiB, by all cores, in the same rounds",
    )
    sides = {x: name for x, name in SIDES.items() if f"{x}_generate_1" in turns}
    for batch in decoding.batches:
        for call, tokens in (("generate", decoding.new), ("prefill", decoding.prompt)):
            seconds = {x: per_round(turns[f"{x}_{call}_{batch}"]) for x in sides}
            yield from _speeds(call, batch, batch * tokens, seconds)
    for batch in decoding.batches:
        yield from _floor_figures(turns, decoding, batch, list(sides), rates)
    yield Figure(
        name="cache of a token",
        value=turns["bytes"][0].result["cache_token"],
        unit="bytes",
        definition="layers x (kv_latent + rope) x 4, in all layers",
    )


def read_rates(turns: Turns) -> list[float]:
    """Returns bytes a second, for each round."""
    return [2**30 / seconds for seconds in per_round(turns["read"])]


def _speeds(
    call: str, batch: int, tokens: int, seconds: Mapping[str, Sequence[float]]
) -> Iterator[Figure]:
    what = {
        "generate": ("decoding", "new tokens over the time of the whole call"),
        "prefill": (
            "prefill",
            "the prompts' tokens over the time to the first new ones",
        ),
    }
    name, definition = what[call]
    for side, times in seconds.items():
        yield Figure(
            name=f"{name} at batch {batch}, {side}",
            value=tokens / _median(times),
            unit="tokens/s",
            definition=f"{definition}, {SIDES[side]}",
        )
    for side in list(seconds)[1:]:
        yield Figure(
            name=f"{name} at batch {batch}, ours / {side}",
            value=ratio(seconds[side], seconds["ours"]),
            unit="×",
            definition=f"tokens/s of jmoe over tokens/s of {SIDES[side]}",
            at_least=_AT_LEAST.get((call, side), {}).get(batch),
        )


def _floor_figures(
    turns: Turns,
    decoding: Decoding,
    batch: int,
    sides: Sequence[str],
    rates: Sequence[float],
) -> Iterator[Figure]:
    found = turns["bytes"][0].result
    size, experts = found["step"][str(batch)], found["experts"][str(batch)]
    yield Figure(
        name=f"step's floor at batch {batch}",
        value=_median([size / rate for rate in rates]) * 1e3,
        unit="ms",
        definition=f"{size / 1e6:.1f} MB of weights at the read bandwidth; tokens "
        f"choose {experts:.1f} distinct experts a step, over all layers",
    )
    for side in sides:
        whole, first = (
            per_round(turns[f"{side}_{call}_{batch}"])
            for call in ("generate", "prefill")
        )
        steps = [
            (a - b) / (decoding.new - 1) for a, b in zip(whole, first, strict=True)
        ]
        asked = 0.6 if (side, batch) == ("ours", 1) else None
        yield Figure(
            name=f"floor / {side} at batch {batch}",
            value=ratio([size / rate for rate in rates], steps),
            unit="×",
            definition="share of a step, without the prompt's reading, that its "
            "weights' bytes need",
            at_least=asked,
        )


def request_figures(turns: Turns) -> Iterator[Figure]:
    """Many requests, one after the other and together."""
    tokens = sum(map(len, turns["together"][0].result))
    for task in TASKS["requests"]:
        yield Figure(
            name=f"mixed requests, {task}",
            value=tokens / _median(per_round(turns[task])),
            unit="tokens/s",
            definition=f"{tokens} new tokens of all requests over the whole time",
        )
    yield Figure(
        name="mixed requests, together / one_by_one",
        value=ratio(per_round(turns["one_by_one"]), per_round(turns["together"])),
        unit="×",
        definition="tokens/s under continuous batching over one after the other",
        at_least=3.0,
    )


def context_line(turns: Turns, contexts: Sequence[int]) -> tuple[float, float, float]:
    """Returns seconds without context and of a token of it, and the fit's R²."""
    seconds = _context_seconds(turns)
    slope, start = map(float, np.polyfit(contexts, seconds, 1))
    rest = seconds - (start + slope * np.array(contexts))
    return start, slope, float(1 - rest.var() / seconds.var())


def context_figures(turns: Turns, contexts: Sequence[int]) -> Iterator[Figure]:
    """How a step's time rises with the context, against the cache's bytes."""
    start, slope, fit = context_line(turns, contexts)
    cached = turns["bytes"][0].result["cache_token"]
    rate = _median(read_rates(turns))
    yield Figure(
        name="step without context",
        value=start * 1e3,
        unit="ms",
        definition="where the line through the steps' times begins",
    )
    yield Figure(
        name="step's rise over 1,000 tokens of context",
        value=slope * 1e6,
        unit="ms",
        definition="the line's slope",
    )
    yield Figure(
        name="that rise over the cache's bytes",
        value=slope * rate / cached,
        unit="×",
        definition=f"over {cached} bytes a token at the read bandwidth",
    )
    yield Figure(
        name="R² of the line",
        value=fit,
        unit="",
        definition="share of the variance between contexts that it explains",
        at_least=0.95,
    )


def draw_context(turns: Turns, contexts: Sequence[int], path: pathlib.Path) -> None:
    """Draws a step's time against its context, with the line and the cache's bytes."""
    start, slope, _ = context_line(turns, contexts)
    cached = turns["bytes"][0].result["cache_token"]
    floor = cached / _median(read_rates(turns))
    picture = Picture(figsize=(5.4, 3.4), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    ends = np.array([0, max(contexts)])
    milliseconds = 1e3 * _context_seconds(turns)
    axes.plot(contexts, milliseconds, "o", color="#0b6e4f", label="measured")
    line = {"color": "#0b6e4f", "linewidth": 1, "label": "line through these"}
    axes.plot(ends, 1e3 * (start + slope * ends), **line)
    line = {"color": "grey", "linewidth": 0.8, "linestyle": ":"}
    label = "rise by the cache's bytes alone"
    axes.plot(ends, 1e3 * (start + floor * ends), label=label, **line)
    axes.set(xlabel="tokens of context", ylabel="ms", title="decoding step, batch 1")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture.savefig(path, dpi=160)


def arrival_figures(turns: Turns) -> Iterator[Figure]:
    """What a long prompt costs those whose tokens are decoded beside it."""
    rounds = [turn.result for turn in turns["arrival"]]

    def of_rounds(name: str) -> float:
        return _median([_median(each[name]) for each in rounds])

    for name, definition in (
        ("undisturbed", "between tokens of 7 requests, with no prompt to read"),
        ("alone", "a step that reads a chunk of 128 tokens and decodes none"),
        ("beside", "between tokens of 7 requests, while a long prompt is read"),
    ):
        yield Figure(
            name=f"step, {name}",
            value=of_rounds(name) * 1e3,
            unit="ms",
            definition=definition,
        )
    yield Figure(
        name="step, beside / alone",
        value=_median([ratio(each["beside"], each["alone"]) for each in rounds]),
        unit="×",
        definition="of the same chunk; the median over chunks",
        at_most=2.0,
    )


def draft_figures(turns: Turns) -> Iterator[Figure]:
    """Drafts of a trained model's MTP module against plain decoding."""
    plain = per_round(turns["drafts_0"])
    tokens = sum(map(len, turns["drafts_0"][0].result["tokens"]))
    yield Figure(
        name="trained model, plain",
        value=tokens / _median(plain),
        unit="tokens/s",
        definition="experiments/tiny_deep.py, held-out text, one request at a time",
    )
    gains = {}
    for drafts in (1, 2):
        found, times = turns[f"drafts_{drafts}"], per_round(turns[f"drafts_{drafts}"])
        result = found[0].result
        gains[drafts] = ratio(plain, times)
        for ahead, right in enumerate(result["accepted"], start=1):
            yield Figure(
                name=f"acceptance of draft {ahead} of {drafts}",
                value=right / result["steps"],
                unit="share",
                definition="of the steps; a draft counts if those before it are right",
            )
        yield Figure(
            name=f"tokens a step, {drafts} drafts",
            value=1 + sum(result["accepted"]) / result["steps"],
            unit="",
            definition="the token itself, and the drafts that were right",
        )
        yield Figure(
            name=f"speed with {drafts} drafts / plain",
            value=gains[drafts],
            unit="×",
            definition="tokens/s over those without drafts",
        )
    yield Figure(
        name="speed with drafts / plain",
        value=max(gains.values()),
        unit="×",
        definition="of the better number of drafts",
        at_least=1.516,
    )
    found = turns["bytes"][0].result
    right = turns["drafts_1"][0].result
    acceptance = right["accepted"][0] / right["steps"]
    measured = found["with_draft"] / found["step"]["1"]
    yield from _floor_of_drafts("bench_s", measured, "that decode", acceptance)
    for name, ratio_of_bytes in found["draft_shapes"].items():
        yield from _floor_of_drafts(name, ratio_of_bytes, "by chance", acceptance)


def _floor_of_drafts(
    shape: str, ratio_of_bytes: float, choices: str, acceptance: float
) -> Iterator[Figure]:
    """What the bytes of a step with a draft leave of its gain, at batch 1."""
    yield Figure(
        name=f"bytes of a step with a draft / without, {shape}",
        value=ratio_of_bytes,
        unit="×",
        definition=f"weights of the distinct experts of two tokens {choices}, the MTP "
        "module and the head again",
    )
    yield Figure(
        name=f"most that a draft can gain, {shape}",
        value=2 / ratio_of_bytes,
        unit="×",
        definition="two tokens a step, every draft right, over those bytes",
    )
    yield Figure(
        name=f"most at the trained model's acceptance, {shape}",
        value=(1 + acceptance) / ratio_of_bytes,
        unit="×",
        definition=f"{1 + acceptance:.3f} tokens a step over those bytes",
    )


def wrong(turns: Turns, decoding: Decoding) -> tuple[str, ...]:
    """Says which sides' tokens differ where they must not."""
    said = []
    for side in SIDES:
        for batch in decoding.batches:
            if f"{side}_generate_{batch}" in turns:
                got = turns[f"{side}_generate_{batch}"][0].result
                same = _same(got, turns[f"ours_generate_{batch}"][0].result)
                if same < _SAME_SHARE:
                    said.append(
                        f"At batch {batch}, {same:.0%} of {SIDES[side]}'s completions "
                        "are jmoe's."
                    )
    for name, plain in (
        ("drafts_1", "drafts_0"),
        ("drafts_2", "drafts_0"),
    ):
        got, want = (turns[x][0].result["tokens"] for x in (name, plain))
        if got != want:
            said.append(f"{_same(got, want):.0%} of completions with {name} are plain.")
    if turns["together"][0].result != turns["one_by_one"][0].result:
        said.append("Requests have other tokens together than one by one.")
    return tuple(said)


def _same(got: Sequence[Any], want: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(got, want, strict=True)) / len(want)


def _context_seconds(turns: Turns) -> np.ndarray:
    return np.median([turn.result for turn in turns["steps"]], axis=0)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)
