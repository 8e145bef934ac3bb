"""Which tensor of a Hugging Face checkpoint is which piece of our variables.

Each family has a table of names (`jmoe.families`), which export and import both expand.
A name of ours is a path in `params` or `router_state`, one of Hugging Face's is what
its checkpoints say. What the expansion adds comes from each parameter's record:

- a stack of layers (`layer_loop="scan"`) and a stack of experts are sliced one by one;
- a fused gate and up projection, which has a dimension of 2, is two tensors;
- a kernel [in, ...] becomes a matrix [out, in], and a bias [heads, ...] a vector;
- what may be stored in FP8 is, where anything is.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax

from jmoe import families
from jmoe.checkpoint import manifest
from jmoe.config import ModelConfig
from jmoe.nn.model import abstract_variables, parameter_records
from jmoe.nn.parameter import FP8, Parameter

COLLECTIONS = ("params", "router_state")

ALL = slice(None)

Leaves = Mapping[str, tuple[tuple[int, ...], Parameter]]  # by path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of a Hugging Face checkpoint, and the piece of our variables it holds.

    shape is theirs; layer, expert and half select the piece of the leaf at `path`,
    which has more dimensions where ours divides one of theirs by heads.
    """

    name: str
    shape: tuple[int, ...]
    path: str  # "params/moe/attention/out/kernel"
    layer: int | None = None
    expert: int | None = None
    half: int | None = None  # of a fused pair
    transposed: bool = False  # the piece, as [in, out], is their transpose
    is_product: bool = False  # may be stored in FP8
    is_copy: bool = False  # repeats a tensor that belongs to the model

    @property
    def is_float32(self) -> bool:
        """Whether it has float32 whatever the rest has."""
        return self.path.startswith("router_state/")

    @property
    def index(self) -> tuple[int | slice, ...]:
        """The index of the piece in the leaf."""
        lead = tuple(i for i in (self.layer, self.expert) if i is not None)
        return lead if self.half is None else (*lead, ALL, self.half)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def expand(cfg: ModelConfig) -> list[Tensor]:
    """Returns every tensor of the checkpoint of `cfg`, layer by layer.

    Raises:
      ValueError: files of its family can't describe the model.
    """
    tensors = list(_expand(cfg))
    named = {tensor.path for tensor in tensors}
    assert abstract_leaves(cfg).keys() == named | {*absent(cfg)}, "a leaf has no name"
    return tensors


def absent(cfg: ModelConfig) -> list[str]:
    """Returns the paths of leaves that the family's files don't have; they are zero."""
    block = families.family_of(cfg).names.block
    tails = tuple(f"/{path}" for path, name in block.items() if name is None)
    return [path for path in abstract_leaves(cfg) if path.endswith(tails)]


def redundant(cfg: ModelConfig) -> list[Tensor]:
    """Returns what a checkpoint may repeat and ours never do: a tied head."""
    if not cfg.tie_embeddings:
        return []
    head, _ = families.family_of(cfg).names.model["head"]
    copies = _rows(_leaves(cfg), "embedding", head)
    return [dataclasses.replace(copy, is_copy=True) for copy in copies]


@functools.lru_cache(maxsize=4)
def abstract_leaves(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the model's variables by path, without their values."""
    return manifest.flatten(abstract_variables(cfg))


@functools.lru_cache(maxsize=4)
def _leaves(cfg: ModelConfig) -> Leaves:
    """Returns the shape and the record of each variable, by path."""
    records = manifest.flatten(parameter_records(cfg))
    leaves = abstract_leaves(cfg)
    return {path: (leaf.shape, records[path]) for path, leaf in leaves.items()}


def _expand(cfg: ModelConfig) -> Iterator[Tensor]:
    leaves = _leaves(cfg)
    names = families.family_of(cfg).names
    for ours, (theirs, _) in names.model.items():
        yield from _rows(leaves, ours, theirs)
    for number, (block, layer) in enumerate(_blocks(cfg)):
        theirs = f"model.layers.{number}"
        yield from _block_rows(leaves, names.block, block, theirs, layer)
    for depth in range(cfg.mtp_depth):
        ours, theirs = f"mtp_{depth}", f"model.layers.{cfg.num_layers + depth}"
        for inside, name in names.mtp.items():
            yield from _rows(leaves, f"{ours}/{inside}", f"{theirs}.{name}")
        yield from _block_rows(leaves, names.block, f"{ours}/block", theirs, None)
        head = "embedding" if cfg.tie_embeddings else "head"
        for path, name in (("embedding", "embedding"), (head, "head")):
            copies = _rows(leaves, path, f"{theirs}.{names.model[name][1]}")
            yield from (dataclasses.replace(copy, is_copy=True) for copy in copies)


def _blocks(cfg: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """Yields where each layer is: in which module, and where in its stack."""
    for name, stack in cfg.stacks.items():
        for position in range(stack.num_layers):
            if cfg.layer_loop == "scan":
                yield name, position
            else:
                yield f"{name}_{position}", None


def _block_rows(
    leaves: Leaves,
    names: families.Table,
    ours: str,
    theirs: str,
    layer: int | None,
) -> Iterator[Tensor]:
    """Returns a block's rows: what keeps its precision comes before matrix products."""
    found: list[Tensor] = []
    for inside, name in names.items():
        pair = (name,) if isinstance(name, str) else name or ()
        found += _rows(
            leaves,
            f"{ours}/{inside}",
            *(f"{theirs}.{part}" for part in pair),
            layer=layer,
        )
    return iter(sorted(found, key=lambda tensor: tensor.is_product))


def _rows(
    leaves: Leaves, ours: str, *theirs: str, layer: int | None = None
) -> Iterator[Tensor]:
    """Yields what a row of a table stands for; nothing where a side has no such."""
    for path in (f"{collection}/{ours}" for collection in COLLECTIONS):
        if path not in leaves or not theirs:
            continue
        shape, record = leaves[path]
        shape = shape[record.is_stacked :]
        experts: Sequence[int | None] = [None]
        if record.of_experts:
            experts, shape = range(shape[0]), shape[1:]
        is_pair = record.pair_dim is not None
        for expert, (half, name) in itertools.product(experts, enumerate(theirs)):
            yield Tensor(
                name=name.format(expert=expert),
                shape=_their_shape(shape, record),
                path=path,
                layer=layer,
                expert=expert,
                half=half if is_pair else None,
                transposed=record.matrix is not None,
                is_product=FP8 in record.formats,
            )


def _their_shape(shape: tuple[int, ...], record: Parameter) -> tuple[int, ...]:
    """Returns a layer's and expert's: a matrix, a half of a pair, a vector, a table."""
    if record.matrix is not None:
        rows = math.prod(shape[1:]) // (2 if record.pair_dim is not None else 1)
        return rows, shape[0]
    return shape if "vocab" in record.dims else (math.prod(shape),)
