"""Draws a training step as data flows through it: docs/step.svg.

    python docs/draw_step.py

Boxes are what computes, with the file that has it; arrows are what flows. Blue are
activations, orange are counts and biases, green are gradients and weights.
"""

import pathlib

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GREEN, GREY = "#2563eb", "#c2570c", "#15803d", "#475569"
PALE = {BLUE: "#eff4ff", ORANGE: "#fff3e6", GREEN: "#edf8f0", GREY: "#f4f5f7"}
INK, FAINT = "#1f2430", "#6b7280"
WIDTH, HEIGHT = 160, 102


class Drawing:
    """Boxes and arrows on a plane whose unit is a tenth of an inch."""

    def __init__(self):
        self.figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        self.axes.axis("off")

    def frame(self, x, y, width, height, title, colour=GREY):
        """Draws a large box with its title in the upper left corner."""
        self._rounded(x, y, width, height, colour, "none", linestyle=(0, (5, 3)))
        self.text(x + 1.5, y + height - 1.4, title, 12, colour, "left", "top", "bold")

    def box(self, x, y, width, height, title, lines=(), file="", colour=BLUE):
        """Draws a box with a title, lines below it, and a file at its bottom."""
        self._rounded(x, y, width, height, colour, PALE[colour])
        middle, top = x + width / 2, y + height - 1.2
        self.text(middle, top, title, 11.5, INK, "center", "top", "bold")
        for number, line in enumerate(lines):
            self.text(middle, top - 2.9 - 2.2 * number, line, 10, INK, "center", "top")
        if file:
            self.text(middle, y + 0.8, file, 8.5, FAINT, "center", "bottom")

    def line(self, start, end, colour):
        """Draws a thin dashed line."""
        ends = zip(start, end, strict=True)
        self.axes.plot(*ends, color=colour, lw=1, linestyle=(0, (5, 3)))

    def arrow(self, *points, text="", at=None, colour=BLUE):
        """Draws an arrow through the points; its text stands at `at`."""
        for start, end in zip(points, points[1:-1], strict=False):
            self.axes.plot(*zip(start, end, strict=True), color=colour, lw=1.6)
        self.axes.add_patch(
            FancyArrowPatch(
                points[-2],
                points[-1],
                arrowstyle="-|>",
                mutation_scale=13,
                color=colour,
                lw=1.6,
                shrinkA=0,
                shrinkB=0,
            )
        )
        if text:
            self.text(*at, text, 10, colour, "center", "center")

    def text(self, x, y, text, size, colour, align, vertical, weight="normal"):
        self.axes.text(
            x,
            y,
            text,
            size=size,
            color=colour,
            ha=align,
            va=vertical,
            weight=weight,
            linespacing=1.35,
        )

    def _rounded(self, x, y, width, height, colour, fill, linestyle="-"):
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=1",
                edgecolor=colour,
                facecolor=fill,
                linestyle=linestyle,
                lw=1.4,
            )
        )


def draw_model(to: Drawing) -> None:
    """Draws the upper half, from tokens to losses."""
    to.frame(24, 41, 134, 59, "for each microbatch: one jax.shard_map over the mesh")
    to.box(2, 83, 15, 10, "Loader", ("text as rows",), "jmoe/data", GREY)
    to.arrow((17, 88), (27, 88), text="tokens", at=(20.5, 89.6))
    to.box(27, 83, 14, 10, "Embedding", (), "parallel/vocabulary.py")
    to.arrow((41, 88), (46, 88))
    to.box(46, 83, 18, 10, "Dense blocks", ("attention, SwiGLU",), "nn/block.py")
    to.arrow((64, 88), (69, 88))
    to.box(69, 83, 18, 10, "MoE blocks", ("attention, experts",), "nn/block.py")
    to.arrow((87, 88), (92, 88))
    to.box(92, 83, 17, 10, "Final norm", ("hidden states",), "nn/tail.py")
    to.arrow((109, 88), (114, 88))
    to.box(114, 83, 19, 10, "Cross-entropy", ("of token t + 1",), "train/losses.py")
    to.box(92, 70, 17, 10, "MTP modules", ("a MoE block each",), "nn/mtp.py")
    to.arrow((100.5, 83), (100.5, 80))
    to.arrow((109, 75), (114, 75))
    to.box(114, 70, 19, 10, "Cross-entropy", ("of t + 2, ...",), "train/losses.py")
    to.box(140, 76, 15, 11, "Objective", ("weighted sum", "of the losses"))
    to.arrow((133, 88), (137, 88), (137, 82.5), (140, 82.5))
    to.arrow((133, 75), (137, 75), (137, 80.5), (140, 80.5))


def draw_experts(to: Drawing) -> None:
    """Draws the inside of a mixture of experts."""
    to.frame(27, 43, 106, 23, "in a MoE block: a mixture of experts, nn/moe.py", BLUE)
    for top, bottom in ((69.5, 60), (86.5, 90.5)):
        to.line((top, 83), (bottom, 66), BLUE)
    router = ("float32 scores", "+ bias for the choice", "groups, then top-k")
    router = (*router, "gates from scores alone")
    to.box(29, 45, 27, 17, "Router", router, "nn/router.py", ORANGE)
    to.arrow((56, 53), (61, 53))
    there = ("each token once", "to each device", "with its experts")
    to.box(61, 45, 18, 17, "Exchange", there, "parallel/exchange.py")
    to.arrow((79, 53), (84, 53))
    experts = ("SwiGLU of each", "expert's rows,", "weighed by gates")
    to.box(84, 45, 20, 17, "Grouped matmuls", experts, "ops/grouped.py")
    to.arrow((104, 53), (109, 53))
    back = ("sums of a token's", "experts, + shared", "experts, + residual")
    to.box(109, 45, 22, 17, "Exchange back", back, "parallel/exchange.py")


def draw_update(to: Drawing) -> None:
    """Draws the lower part, what happens once a step."""
    to.frame(2, 2, 156, 34.5, "")
    to.text(66, 34.9, "once a step, train/step.py", 12, GREY, "center", "top", "bold")
    counts = ("over microbatches,", "devices and stages,", "as integers")
    rule = ("sign(mean - load),", "or another rule")
    to.arrow((42, 45), (42, 29.5), colour=ORANGE)
    to.text(43.3, 38.5, "load of each expert, int32", 10, ORANGE, "left", "center")
    to.box(31, 15, 23, 14.5, "Sum of counts", counts, "parallel/collectives.py", ORANGE)
    to.arrow((31, 22), (26, 22), colour=ORANGE)
    to.box(6, 15, 20, 14.5, "Bias rule", rule, "balance/bias.py", ORANGE)
    to.arrow((16, 15), (16, 10), colour=ORANGE)
    part = ("float32 gradients,", "each device keeps", "its part")
    step = ("clip, then AdamW", "or Muon, on the", "device's part")
    whole = ("weights, in the", "dtype that products", "have")
    to.arrow((147, 76), (147, 29.5), colour=GREEN)
    to.text(148.3, 58, "gradients", 10, GREEN, "left", "center")
    to.box(133, 15, 22, 14.5, "Reduce-scatter", part, "parallel/zero.py", GREEN)
    to.arrow((133, 22), (128, 22), colour=GREEN)
    to.box(106, 15, 22, 14.5, "Optimizer", step, "train/optimizer.py", GREEN)
    to.arrow((117, 15), (117, 10), colour=GREEN)
    state = "Training state: step, params, moments, router_state; saved as a checkpoint"
    to.box(6, 5.5, 149, 4.5, state, colour=GREY)
    to.arrow((88, 10), (88, 15), colour=GREEN)
    to.box(77, 15, 22, 14.5, "All-gather", whole, "train/weights.py", GREEN)
    to.arrow((88, 29.5), (88, 41), colour=GREEN)
    to.text(89.3, 38.5, "params", 10, GREEN, "left", "center")
    to.arrow((6, 7.5), (4, 7.5), (4, 53), (29, 53), colour=ORANGE)
    to.text(5.3, 54.6, "router_state", 10, ORANGE, "left", "center")


def draw() -> Figure:
    """Returns the whole picture."""
    drawing = Drawing()
    draw_model(drawing)
    draw_experts(drawing)
    draw_update(drawing)
    return drawing.figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "jmoe"  # the same bytes every time
    path = pathlib.Path(__file__).with_name("step.svg")
    draw().savefig(path, metadata={"Date": None})
    print(f"Written to {path}")
