"""Random and adversarial routings: who chooses which expert how often.

Each token chooses distinct experts: those of the highest `log popularity + noise`, with
Gumbel noise, which are draws without replacement. Where experts are to be avoided, they
are chosen only by who has no others left.

Shapes: P device that tokens come from, N token of a device, E expert, K choice.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

TOKENS = 256  # of a device


class Shape(NamedTuple):
    """Experts on devices, and how many of them a token chooses."""

    devices: int
    experts: int
    top_k: int

    @property
    def hosted(self) -> int:
        """Experts of a device."""
        return self.experts // self.devices


class Routing(NamedTuple):
    """A routing's kind, its shape, and the counts that are made of it."""

    kind: str
    shape: Shape
    load_PE: np.ndarray


SHAPES = (
    Shape(2, 16, 2),
    Shape(4, 16, 2),
    Shape(4, 64, 6),
    Shape(8, 64, 6),
    Shape(16, 64, 6),
    Shape(8, 256, 8),
    Shape(16, 256, 8),
)
DRAWS = 16  # of each kind for each shape: 9 x 7 x 16 are 1,008 routings


def _dirichlet(alpha: float) -> Callable[[np.random.Generator, Shape], np.ndarray]:
    return lambda rng, shape: rng.dirichlet(np.full(shape.experts, alpha))


def _zipf(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """The first devices have the most popular experts."""
    del rng
    return 1 / np.arange(1, shape.experts + 1)


def _one_expert(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """All tokens choose it, and another at random."""
    del rng
    return np.where(np.arange(shape.experts) == 0, np.inf, 1.0)


def _one_device(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """All choices are one device's experts, if it has enough for a token."""
    del rng
    return np.where(np.arange(shape.experts) < shape.hosted, 1.0, 0.0)


# Popularities of experts [E]; infinite: everybody's choice; 0: nobody's, if avoidable.
KINDS: dict[str, Callable[[np.random.Generator, Shape], np.ndarray]] = {
    "uniform": lambda rng, shape: np.ones(shape.experts),
    "nearly even": _dirichlet(100.0),
    "uneven": _dirichlet(10.0),
    "skewed": _dirichlet(1.0),
    "very skewed": _dirichlet(0.1),
    "zipf": _zipf,
    "zipf, shuffled": lambda rng, shape: rng.permutation(_zipf(rng, shape)),
    "one expert": _one_expert,
    "one device": _one_device,
}


def routings(draws: int = DRAWS, seed: int = 0) -> Iterator[Routing]:
    """Yields `draws` routings of each kind for each shape."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        for kind, popularity in KINDS.items():
            for _ in range(draws):
                load_PE = count(rng, popularity(rng, shape), shape)
                yield Routing(kind, shape, load_PE)


def count(
    rng: np.random.Generator, popularity_E: np.ndarray, shape: Shape
) -> np.ndarray:
    """Returns how many of each device's choices are of each expert, int32 [P, E]."""
    size = (shape.devices, TOKENS, shape.experts)
    noise_PNE = rng.gumbel(size=size).astype(np.float32)
    # Far enough apart that noise brings none from one of the three classes to another.
    popularity_E = np.clip(popularity_E, 1e-30, 1e30).astype(np.float32)
    score_PNE = np.log(popularity_E) + noise_PNE
    chosen_PNK = np.argpartition(score_PNE, -shape.top_k, axis=-1)[..., -shape.top_k :]
    rows = [np.bincount(x.ravel(), minlength=shape.experts) for x in chosen_PNK]
    return np.stack(rows).astype(np.int32)
