"""The bytes that a step of decoding cannot do without, and how fast memory is read.

Shapes: B sequence, T position, L MoE layer, K = top_k chosen experts.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks.workers import Tasks, cores, warm_up
from jmoe.config import ModelConfig
from jmoe.nn.model import abstract_variables
from jmoe.nn.recorded import record_choices


class Bytes(NamedTuple):
    """Bytes of the weights that every step reads, and of one expert of one layer."""

    always: int
    expert: int

    def of(self, experts: float) -> float:
        """Returns those of a step with so many distinct experts, over all layers."""
        return self.always + experts * self.expert


def step_bytes(cfg: ModelConfig) -> Bytes:
    """Returns the bytes of the model's own layers and its head.

    A step reads a few rows of the embedding, which don't count, unless it is the head.
    """

    def is_read(name: str) -> bool:
        is_table = name == "embedding" and not cfg.tie_embeddings
        return not (is_table or name.startswith("mtp_"))

    return _bytes(cfg, is_read)


def draft_bytes(cfg: ModelConfig) -> Bytes:
    """Returns the bytes of the first MTP module, and of the head once more."""
    head = "embedding" if cfg.tie_embeddings else "head"
    return _bytes(cfg, lambda name: name in ("mtp_0", head))


def draft_ratio(cfg: ModelConfig) -> float:
    """Returns the bytes of a step with a draft over those of one without.

    As much as two tokens choose by chance of the same experts, where all are equally
    likely.
    """
    router = cfg.moe.router
    one, share = router.top_k, router.top_k / router.num_experts
    two = one + one * (1 - share)
    own, drafting = step_bytes(cfg), draft_bytes(cfg)
    with_draft = own.of(cfg.num_moe_layers * two) + drafting.of(two)
    return with_draft / own.of(cfg.num_moe_layers * one)


def _bytes(cfg: ModelConfig, is_read: Callable[[str], bool]) -> Bytes:
    leaves, _ = jax.tree.flatten_with_path(abstract_variables(cfg)["params"])
    item, always = np.dtype(cfg.dtype).itemsize, 0
    for path, x in leaves:
        names = [key.key for key in path]
        if is_read(names[0]) and "experts" not in names:
            always += x.size * item
    return Bytes(always, 3 * cfg.hidden_dim * cfg.moe.expert_mlp_dim * item)


def choices(cfg: ModelConfig, variables: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """Returns the experts that each layer's router chooses, int32 [L, B, T, K]."""
    record = jax.jit(record_choices, static_argnums=0)
    expert_BLTK = record(cfg, variables, tokens_BT).expert_BLTK
    return np.asarray(expert_BLTK[:, : cfg.num_moe_layers].swapaxes(0, 1))


def distinct(expert_LSN: np.ndarray) -> float:
    """Returns how many distinct experts a step reads, over all layers, on average.

    Args:
      expert_LSN: for each layer and step, all choices of the step's tokens.
    """
    ordered_LSN = np.sort(expert_LSN, axis=-1)
    is_new_LSN = np.diff(ordered_LSN, axis=-1) != 0
    return float((1 + is_new_LSN.sum(-1)).sum(0).mean())


def of_batch(expert_LBTK: np.ndarray, batch: int) -> float:
    """Returns `distinct` of steps that decode a token of the first sequences each."""
    steps_LTBK = expert_LBTK[:, :batch].swapaxes(1, 2)
    return distinct(steps_LTBK.reshape(*steps_LTBK.shape[:2], -1))


def of_drafts(expert_LBTK: np.ndarray, tokens: int) -> float:
    """Returns `distinct` of steps with so many consecutive tokens of one sequence."""
    steps = expert_LBTK.shape[2] - tokens + 1
    parts = [expert_LBTK[:, :, i : i + steps] for i in range(tokens)]
    joined = np.concatenate(parts, axis=-1)
    return distinct(joined.reshape(len(joined), -1, joined.shape[-1]))


def read(size: int = 2**30) -> Tasks:
    """`read` returns bytes a second of reading an array that no cache holds.

    Each core has a part, of which it makes the inner product with itself: of what NumPy
    does with an array, that reads fastest.
    """
    parts = np.array_split(np.ones(size // 4, np.float32), cores())
    threads = concurrent.futures.ThreadPoolExecutor(cores())

    def task() -> None:
        list(threads.map(lambda part: np.dot(part, part), parts))

    warm_up(task)
    return {"read": task}
