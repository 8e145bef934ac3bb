"""The small files beside the weights: configuration, tokenizer, model card.

The tokenizer begins a text with the token that opens documents, because that is what
the model was trained on. Its chat template writes the turns of a conversation as plain
text: jmoe trains base models, which have no markup for turns.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer
from jmoe.export.numerics import BLOCK
from jmoe.train.formatting import count
from jmoe.train.run_files import Run
from jmoe.train.trained import TOKENIZER

GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CARD = "README.md"

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

# What a run measured last, as the card says it.
_FIGURES = {
    "val_loss": "validation loss, nats a token",
    "val_perplexity": "validation perplexity",
    "global_max_vio": "global MaxVio (0: all experts equally busy)",
    "tokens": "tokens trained on",
}


def config_json(
    cfg: ModelConfig, *, dtype: str, is_fp8: bool, eos_id: int | None
) -> dict[str, Any]:
    """`config.json` of weights in `dtype`, those of products in FP8 if `is_fp8`."""
    extras = json.loads(cfg.hf_extras)
    for key in ("auto_map", "quantization_config"):  # of code and weights elsewhere
        extras.pop(key, None)
    plain = dataclasses.replace(cfg, dtype=dtype, hf_extras=json.dumps(extras))
    written = plain.to_hf()
    if is_fp8:
        written["quantization_config"] = QUANTIZATION
    if eos_id is not None:
        written = {"bos_token_id": eos_id, "eos_token_id": eos_id} | written
    return written


def tokenizer_files(
    path: pathlib.Path, max_positions: int
) -> tuple[dict[str, Any], int]:
    """What follows from a run's tokenizer.json: files by name, and the end's token.

    The files are tokenizer.json, tokenizer_config.json and generation_config.json. A
    run that was imported has the first two, and they stay as they are.

    Raises:
      FileNotFoundError, ValueError: it is missing, or no tokenizer.
    """
    tokenizer = Tokenizer.from_file(path)
    opening = tokenizer.decode([tokenizer.eos_id])
    described = json.loads(path.read_text(encoding="utf-8"))
    imported = path.with_name(TOKENIZER_CONFIG)
    if imported.is_file():
        config = json.loads(imported.read_text(encoding="utf-8"))
    else:
        if not described.get("post_processor"):
            described["post_processor"] = _opens_with(opening, tokenizer.eos_id)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": opening,
            "eos_token": opening,
            "model_max_length": max_positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
    files = {
        TOKENIZER: described,
        TOKENIZER_CONFIG: config,
        GENERATION: _generation_json(tokenizer.eos_id),
    }
    return files, tokenizer.eos_id


def _generation_json(eos_id: int) -> dict[str, Any]:
    """How to sample, unless a request says otherwise: as scripts/generate.py does."""
    return {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.95,
    }


def _opens_with(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts one token before a text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def model_card(cfg: ModelConfig, run: Run, step: int, *, written_as: str) -> str:
    """README.md: what the model is, what its run measured, how to load it."""
    router = cfg.moe.router
    parameters = ""
    if "parameters" in run.info:
        total, active = run.info["parameters"], run.info["active_parameters"]
        parameters = f", {count(total)} parameters, {count(active)} of them a token"
    rows = {"training steps": f"{step:,}"} | _measured(run.rows, step)
    table = "\n".join(f"| {what} | {value} |" for what, value in rows.items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- jmoe
- mixture-of-experts
---

# {run.config.get("name", run.directory.name)}

A `DeepseekV3ForCausalLM`{parameters}: {cfg.num_layers} layers of {cfg.hidden_dim}
dimensions, {router.num_experts} routed experts of which each token visits
{router.top_k}, {cfg.mtp_depth} module(s) for multi-token prediction. A base model,
trained by jmoe with loss-free load balancing (rule `{router.update_rule}`). Weights are
stored as {written_as}.

| what | figure |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
prompt = tokenizer("def mean(values):", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
"""


def _measured(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, str]:
    """The last value of each figure up to `step`."""
    found = {}
    for key, what in _FIGURES.items():
        values = [row[key] for row in rows if key in row and row["step"] <= step]
        if values:
            found[what] = _figure(values[-1])
    return found


def _figure(value: int | float | str) -> str:
    """As text; what isn't finite is a word in a run's files, and stays one."""
    if isinstance(value, str):
        return f"{value}: the run has diverged"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
