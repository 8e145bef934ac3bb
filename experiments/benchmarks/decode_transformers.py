"""transformers' `generate` at its best, a side of the decoding benchmark.

Prompts are read with `grouped_mm` experts. What comes next depends on the batch:
`batched_mm` copies the weights of each chosen expert, which pays for few tokens. Each
way, `generate` has a cache of fixed size, with which it may compile the model's forward
pass. The faster of the ways is kept, by batch.

The parent process has to set the environment that makes glibc keep freed memory.
"""

import inspect
import time
from typing import Any

import torch
import transformers

from experiments.benchmarks.decode_work import Decoding
from experiments.benchmarks.workers import Tasks, cores

READS = "grouped_mm"
# How to decode: by which experts, and compiled or not. Compiled, batched_mm is slower.
WAYS = (("grouped_mm", True), ("grouped_mm", False), ("batched_mm", False))
_TRIED_TOKENS = 17
_FEW = 8  # sequences for which batched_mm has memory


def generate(directory: str, decoding: Decoding) -> Tasks:
    """`prefill_B` and `generate_B` of each batch return tokens; `kept` the ways."""
    torch.set_num_threads(cores())
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32
    )
    side = _Side(model.eval(), decoding)
    kept, tasks = {}, {}
    for batch in decoding.batches:
        kept[batch] = side.fastest(batch)
        tasks[f"prefill_{batch}"] = side.task(batch, 1, *kept[batch])
        tasks[f"generate_{batch}"] = side.task(batch, decoding.new, *kept[batch])
    return {**tasks, "kept": lambda: {str(b): list(way) for b, way in kept.items()}}


class _Side:
    def __init__(self, model: Any, decoding: Decoding):
        self._model, self._decoding = model, decoding
        # transformers 5.24 has another name for it.
        names = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in names else "past_key_values"

    def fastest(self, batch: int) -> tuple[str, bool]:
        """Tries all ways; each is compiled before its time counts."""
        tried, seconds = min(_TRIED_TOKENS, self._decoding.new), {}
        for way in WAYS:
            if way[0] == "batched_mm" and batch > _FEW:
                continue
            for _ in range(2):
                start = time.perf_counter()
                self.complete(batch, tried, *way)
                seconds[way] = time.perf_counter() - start
        return min(seconds, key=lambda way: seconds[way])

    def task(self, batch: int, new: int, *way: Any):
        return lambda: self.complete(batch, new, *way)

    @torch.no_grad()
    def complete(
        self, batch: int, new: int, experts: str, is_compiled: bool
    ) -> list[list[int]]:
        """Returns the new tokens of the first prompts, greedily."""
        prompt_BT = torch.from_numpy(self._decoding.prompts(batch))
        cache = transformers.StaticCache(
            config=self._model.config, max_cache_len=self._decoding.length
        )
        tokens_BT = self._go_on(prompt_BT, cache, 1, READS, False)
        if new > 1:
            tokens_BT = self._go_on(tokens_BT, cache, new - 1, experts, is_compiled)
        return tokens_BT[:, prompt_BT.shape[1] :].tolist()

    def _go_on(
        self, tokens_BT: Any, cache: Any, new: int, experts: str, is_compiled: bool
    ) -> Any:
        compiling: Any = transformers.CompileConfig(fullgraph=False, dynamic=False)
        compiling._compile_all_devices = True  # otherwise on GPUs alone
        self._model.set_experts_implementation(experts)
        return self._model.generate(
            tokens_BT,
            **{self._cache: cache},
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            compile_config=compiling,
            disable_compile=not is_compiled,
        )
