"""vLLM on the CPU, compiled, with all cores: a side of the decoding benchmark.

The parent process has to set `environment()`. The model's attention is expanded to
heads: vLLM's kernels for latents have one size, which isn't the model's.
"""

import importlib
import os
import pathlib
import sys
from typing import Any

from experiments.benchmarks.decode_work import Decoding
from experiments.benchmarks.workers import Tasks


def environment() -> dict[str, str]:
    """Returns the variables that make vLLM fast, before anything is loaded."""
    cores = sorted(os.sched_getaffinity(0))
    openmp = pathlib.Path(sys.prefix, "lib", "libiomp5.so")
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_MLA_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
    }


def generate(directory: str, decoding: Decoding) -> Tasks:
    """`prefill_B` and `generate_B` of each batch return tokens."""
    vllm: Any = importlib.import_module("vllm")  # in an environment of its own

    llm = vllm.LLM(
        model=directory,
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=2 * decoding.length,
        max_num_seqs=max(decoding.batches),
        enable_prefix_caching=False,  # prompts come again in every round
        seed=0,
    )

    def task(batch: int, new: int):
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        prompts: Any = [
            {"prompt_token_ids": prompt} for prompt in decoding.prompts(batch).tolist()
        ]

        def complete() -> list[list[int]]:
            found = llm.generate(prompts, sampling, use_tqdm=False)
            return [list(each.outputs[0].token_ids) for each in found]

        complete()
        return complete

    return {
        f"{name}_{batch}": task(batch, new)
        for batch in decoding.batches
        for name, new in (("prefill", 1), ("generate", decoding.new))
    }
