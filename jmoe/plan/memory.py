"""What a model's weights take, by part and by form, and its cache; nothing is computed.

Bytes are those of the arrays that `jmoe.nn.quantized` makes, with scales, and of those
that `jmoe.nn.mixers` says a decoder keeps.
"""

import functools
from typing import Any, NamedTuple

import jax
import rich.table

from jmoe.config import ModelConfig
from jmoe.nn import block
from jmoe.nn.model import Transformer, make_variables, parameter_records
from jmoe.nn.quantized import quantize_weights

GB = 10**9

# A weight belongs to the first part of which its path has a name.
PARTS = {
    "routed experts": {"experts"},
    "shared experts": {"shared"},
    "routers": {"router"},
    "norms": {"scale"},
    "attention": {"attention"},
    "dense MLPs": {"mlp"},
    "embedding": {"embedding"},
    "head": {"head"},
    "MTP projections": {"project"},
}


class Footprint(NamedTuple):
    """How many weights, and what they take."""

    weights: int
    size: int  # bytes

    @property
    def bits(self) -> float:
        """How many bits a weight takes on average."""
        return 8 * self.size / self.weights


def make_weights(cfg: ModelConfig, form: str) -> dict[str, Any]:
    """Makes a new model's variables as inference keeps them.

    Jit or `eval_shape` it.
    """
    variables = make_variables(Transformer(cfg), seed=0)
    params = jax.tree.map(
        lambda record, x: x.astype(record.compute_dtype(cfg.dtype)),
        parameter_records(cfg)["params"],
        variables["params"],
    )
    return {**variables, "params": quantize_weights(params, cfg, form)}


def weights(cfg: ModelConfig, form: str) -> dict[str, Footprint]:
    """Returns the parts of a model, the largest first, all layers' together."""
    kept = jax.eval_shape(functools.partial(make_weights, cfg, form))
    plain = jax.eval_shape(functools.partial(make_weights, cfg, "native"))
    counts, sizes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for path, x in jax.tree.leaves_with_path(plain):
        counts[_part(path)] += x.size
    for path, x in jax.tree.leaves_with_path(kept):
        sizes[_part(path)] += x.size * x.dtype.itemsize
    parts = [
        (name, Footprint(counts[name], sizes[name])) for name in PARTS if counts[name]
    ]
    return dict(sorted(parts, key=lambda part: -part[1].size))


def cached_bytes(cfg: ModelConfig) -> int:
    """Returns what a decoder keeps of a token for all layers, MTP modules' too."""
    return (cfg.num_layers + cfg.mtp_depth) * block.cached_bytes(cfg)


def _part(path: Any) -> str:
    names = {getattr(key, "key", None) for key in path}
    return next(part for part, of_part in PARTS.items() if names & of_part)


def table(parts: dict[str, Footprint], title: str) -> rich.table.Table:
    """Returns the parts and their sum."""
    total = Footprint(*map(sum, zip(*parts.values(), strict=True)))
    made = rich.table.Table(title=title, title_justify="left", show_footer=True)
    made.add_column("part", "all")
    for name, footer in [
        ("weights", f"{total.weights:,}"),
        ("bits each", f"{total.bits:.2f}"),
        ("GB", f"{total.size / GB:.2f}"),
    ]:
        made.add_column(name, footer, justify="right")
    for name, part in parts.items():
        made.add_row(
            name, f"{part.weights:,}", f"{part.bits:.2f}", f"{part.size / GB:.2f}"
        )
    return made
