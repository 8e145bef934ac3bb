"""torch's side of the GPU benchmark: a process that times its operations when asked.

Products by cuBLAS, torch's grouped ones, attention by each of its kernels that takes
the shapes. What torch refuses has no result, and the reason is kept.

Shapes: M row, I input, O output, E expert; of attention, B batch, H head, T position,
Q query/key and V value dimension.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks import gpu_shapes
from experiments.benchmarks.gpu_shapes import (
    BOTH_PASSES,
    FORWARD,
    INPUTS,
    WEIGHTS,
    Attention,
    Ceilings,
    Dense,
    Grouped,
)
from experiments.benchmarks.gpu_timing import (
    Contender,
    Failed,
    Measured,
    Outcome,
    first_line,
    time_calls,
)
from experiments.benchmarks.workers import Tasks

SETS = 2  # of inputs, which take turns

# Whether values have to be as wide as keys.
_ATTENTION = {
    "torch flash": (SDPBackend.FLASH_ATTENTION, True),
    "torch cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
    "torch efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
}


class Subject(NamedTuple):
    """A contender's function, and the shapes of the bfloat16 arrays it is given."""

    operation: str
    system: str
    shapes: tuple[tuple[int, ...], ...]
    function: Callable[..., Any]


def subjects(case: gpu_shapes.Case, device: str) -> Iterator[Subject]:
    """All that torch does of a case; of some, nothing."""
    match case:
        case Ceilings():
            square = case.size, case.size
            yield Subject("matmul", "torch", (square, square), torch.matmul)
            yield Subject("copy", "torch", ((case.copied // 2,),), torch.clone)
        case Dense():
            yield from _products(case, (FORWARD, WEIGHTS), "torch")
        case Grouped():
            yield from _products(case, (FORWARD, INPUTS, WEIGHTS), "dense torch")
            yield from _grouped(case, device)
        case Attention():
            yield from _attention(case)


def contenders(
    cases: Sequence[gpu_shapes.Case], device: str, rounds: int
) -> dict[Contender, Callable[[], Measured]]:
    """What measures each."""
    return {
        Contender(case.name, subject.operation, subject.system): functools.partial(
            measure, subject, device, rounds
        )
        for case in cases
        for subject in subjects(case, device)
    }


def side(cases: Sequence[gpu_shapes.Case], seed: int, rounds: int) -> Tasks:
    """`contenders` lists them; the others measure. Without a GPU there are none."""
    torch.manual_seed(seed)
    found = contenders(cases if torch.cuda.is_available() else (), "cuda", rounds)
    tasks = {str(name): functools.partial(attempt, run) for name, run in found.items()}
    return tasks | {"contenders": lambda: list(found)}


def attempt(run: Callable[[], Measured]) -> Outcome:
    """Its result, or why there is none; raises if this process can't go on."""
    try:
        return run()
    except Exception as error:  # whatever torch raises is its result
        outcome = Failed(first_line(error))
        torch.cuda.synchronize()
        return outcome
    finally:
        torch.cuda.empty_cache()  # the other side needs the memory


def measure(subject: Subject, device: str, rounds: int) -> Measured:
    """Its times on random inputs."""
    sets = [
        [torch.randn(s, dtype=torch.bfloat16, device=device) for s in subject.shapes]
        for _ in range(SETS)
    ]

    def wait(result: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def enqueue() -> list[Any]:
        return [subject.function(*inputs) for inputs in sets]

    return Measured(time_calls(enqueue, wait, rounds, calls=SETS))


def _products(
    case: Dense | Grouped, operations: Sequence[str], system: str
) -> Iterator[Subject]:
    """Yields products of all rows with one weight."""
    x_MI, dy_MO = (case.rows, case.inputs), (case.rows, case.outputs)
    w_IO = case.inputs, case.outputs
    products = {
        FORWARD: ((x_MI, w_IO), torch.matmul),
        INPUTS: ((dy_MO, w_IO), lambda dy, w: dy @ w.T),
        WEIGHTS: ((x_MI, dy_MO), lambda x, dy: x.T @ dy),
    }
    for operation in operations:
        yield Subject(operation, system, *products[operation])


def _grouped(case: Grouped, device: str) -> Iterator[Subject]:
    """Each expert's rows with its weight, and the gradients of both."""
    grouped_mm: Any = getattr(functional, "grouped_mm", None) or getattr(
        torch, "_grouped_mm", None
    )
    if grouped_mm is None or not case.compared:
        return
    sizes = torch.tensor(case.sizes(), dtype=torch.int32, device=device)
    product = functools.partial(grouped_mm, offs=sizes.cumsum(0, dtype=torch.int32))
    x_MI, dy_MO = (case.rows, case.inputs), (case.rows, case.outputs)
    w_EIO = case.experts, case.inputs, case.outputs
    products = {
        FORWARD: ((x_MI, w_EIO), product),
        INPUTS: ((dy_MO, w_EIO), lambda dy, w: product(dy, w.mT)),
        WEIGHTS: ((x_MI, dy_MO), lambda x, dy: product(x.T, dy)),
    }
    for operation, (shapes, function) in products.items():
        yield Subject(operation, "torch grouped_mm", shapes, function)


def _attention(case: Attention) -> Iterator[Subject]:
    lead = case.batch, case.heads, case.length
    q_BHTQ, v_BHTV = (*lead, case.qk_dim), (*lead, case.value_dim)
    shapes = q_BHTQ, q_BHTQ, v_BHTV, v_BHTV  # the last is the result's gradient
    for system, (backend, is_padded) in _ATTENTION.items():
        attend = functools.partial(_attend, case.scale, backend, is_padded)
        yield Subject(FORWARD, system, shapes, functools.partial(_forward, attend))
        both = functools.partial(_forward_backward, attend)
        yield Subject(BOTH_PASSES, system, shapes, both)


def _attend(
    scale: float,
    backend: SDPBackend,
    is_padded: bool,
    q_BHTQ: torch.Tensor,
    k_BHTQ: torch.Tensor,
    v_BHTV: torch.Tensor,
) -> torch.Tensor:
    value_dim = v_BHTV.shape[-1]
    if is_padded:
        v_BHTV = functional.pad(v_BHTV, (0, q_BHTQ.shape[-1] - value_dim))
    with sdpa_kernel(backend):
        out = functional.scaled_dot_product_attention(
            q_BHTQ, k_BHTQ, v_BHTV, is_causal=True, scale=scale
        )
    return out[..., :value_dim]


@torch.no_grad()
def _forward(attend: Callable[..., torch.Tensor], *tensors: torch.Tensor):
    return attend(*tensors[:3])


def _forward_backward(attend: Callable[..., torch.Tensor], *tensors: torch.Tensor):
    *inputs, d_out_BHTV = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(attend(*inputs), inputs, d_out_BHTV)
