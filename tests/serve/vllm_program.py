"""What vLLM answers of several models, one after another, in a process of its own.

python vllm_program.py NEW [[DIRECTORY, [PROMPT, ...]], ...]

Prompts are token ids, as JSON; each gets NEW of the most likely tokens. The last line
has those of all models.
"""

import gc
import json
import os
import pathlib
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # or each engine is a process


def main(new: int, models: list[tuple[str, list[list[int]]]]) -> None:
    answers = [answer(pathlib.Path(path), new, prompts) for path, prompts in models]
    print("\n" + json.dumps(answers))


def answer(path: pathlib.Path, new: int, prompts: list[list[int]]) -> list[list[int]]:
    """Starts the engine as `scripts/serve.py` does, and ends it."""
    from jmoe.config.serve import EngineConfig, ServeConfig
    from jmoe.serve.vllm_engine import make_engine, read_exported, this_host

    serving = ServeConfig(name="m", engine=EngineConfig(cache_gib=0.05))
    engine = make_engine(read_exported(path), serving, this_host())
    os.environ.update(engine.environment)  # before vLLM is imported

    from vllm import LLM, SamplingParams

    llm = LLM(**engine.arguments, skip_tokenizer_init=True)
    wanted = SamplingParams(
        max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False
    )
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(tokens, wanted, use_tqdm=False)
    del llm
    gc.collect()
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
