"""transformers' `DeepseekV3ForCausalLM` at its best, the other side of the benchmarks.

That is `grouped_mm` experts, eager attention and torch.compile; its defaults take twice
as long. The parent process has to set the environment that makes glibc keep freed
memory, as `keep_freed_memory` does on jmoe's side.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch.nn import functional

from experiments.benchmarks.workers import Tasks, cores, warm_up
from experiments.benchmarks.workload import Workload
from jmoe import families
from jmoe.config import ModelConfig, OptimizerConfig


def train_step(workload: Workload, adamw: str) -> Tasks:
    """`step` returns the loss; `parameters`, how many there are.

    Args:
      adamw: which of torch's implementations, "fused" or "foreach".
    """
    return _train_step(_model(workload.model), workload, adamw, torch.compile)


def train_step_on_gpu(workload: Workload, kind: str, device: str = "cuda") -> Tasks:
    """The same in bfloat16, weights and all; "eager" or "compiled".

    Attention is torch's own, which chooses the kernel.
    """
    with torch.device(device):
        model: Any = _model(workload.model).bfloat16()
    model.set_attn_implementation("sdpa")
    wraps = {"eager": lambda function: function, "compiled": torch.compile}
    return _train_step(model, workload, "fused", wraps[kind])


def _train_step(
    model: Any, workload: Workload, adamw: str, wrap: Callable[..., Any]
) -> Tasks:
    cfg = OptimizerConfig()
    optimizer = _adamw(model, adamw, cfg)
    tokens_BT = torch.from_numpy(workload.token_ids()).long().to(model.device)
    input_BT, target_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    @wrap
    def loss_of(input_BT: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV = model(input_ids=input_BT, use_cache=False).logits
        return functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(input_BT, target_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        optimizer.step()
        return loss.item()

    warm_up(step)
    parameters = sum(p.numel() for p in model.parameters())
    return {"step": step, "parameters": lambda: parameters}


def adamw_step(workload: Workload, kinds: Sequence[str]) -> Tasks:
    """A task for each of torch's implementations, on the model's parameters."""
    model = _model(workload.model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    tasks = {kind: _adamw(model, kind, OptimizerConfig()).step for kind in kinds}
    for step in tasks.values():
        warm_up(step)
    return tasks


def moe_layer(workload: Workload) -> Tasks:
    """`eager` and `compiled`: forward and backward of a router with its routed experts.

    Gradients are those of the input and of every weight.
    """
    one_layer = dataclasses.replace(workload.model, num_layers=1, num_dense_layers=0)
    layer: Any = _model(one_layer).model.layers[0].mlp
    x_ND = torch.randn(workload.tokens, workload.model.hidden_dim, requires_grad=True)
    dy_ND = torch.randn_like(x_ND)

    def forward(x_ND: torch.Tensor) -> torch.Tensor:
        _, gate_NK, expert_NK = layer.gate(x_ND)
        return layer.experts(x_ND, expert_NK, gate_NK)

    def task(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def forward_backward() -> None:
            layer.zero_grad(set_to_none=True)
            x_ND.grad = None
            forward(x_ND).backward(dy_ND)

        warm_up(forward_backward)
        return forward_backward

    return {"eager": task(forward), "compiled": task(torch.compile(forward))}


def _model(cfg: ModelConfig) -> transformers.DeepseekV3ForCausalLM:
    torch.set_num_threads(cores())
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**families.to_hf(cfg))
    model = transformers.DeepseekV3ForCausalLM(config)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("grouped_mm")
    return model.train()


def _adamw(
    model: torch.nn.Module, kind: str, cfg: OptimizerConfig
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(),
        lr=cfg.schedule.peak,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.epsilon,
        weight_decay=cfg.weight_decay,
        **{kind: True},
    )
