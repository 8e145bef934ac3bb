"""The small files beside the weights: configuration, tokenizer, model card.

The tokenizer of a model that jmoe trained begins a text with the token that opens
documents, because that is what the model was trained on. Its chat template writes the
turns of a conversation as plain text: jmoe trains base models, which have no markup for
turns. A model that was imported keeps its own files.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jmoe import families
from jmoe.config import ModelConfig
from jmoe.data.formatting import count
from jmoe.data.special_tokens import (
    GENERATION,
    TOKENIZER_CONFIG,
    describe_tokens,
)
from jmoe.data.tokenizer import Tokenizer
from jmoe.export import names
from jmoe.export.numerics import BLOCK
from jmoe.monitor.run_files import Run
from jmoe.train.trained import TOKENIZER

CARD = "README.md"

QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
# Unless a request says otherwise: as scripts/generate.py does.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.95}
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
    cfg: ModelConfig, *, dtype: str, is_fp8: bool, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns `config.json` of weights in `dtype`, with products in FP8 if `is_fp8`."""
    extras = json.loads(cfg.hf_extras)
    for key in ("auto_map", "quantization_config"):  # of code and weights elsewhere
        extras.pop(key, None)
    plain = dataclasses.replace(cfg, dtype=dtype, hf_extras=json.dumps(extras))
    written = families.to_hf(plain)
    if is_fp8:
        written["quantization_config"] = QUANTIZATION
    return token_ids(tokenizer) | written if tokenizer is not None else written


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns what opens and what ends a text, as Hugging Face's files say it."""
    stops = list(tokenizer.stop_ids)
    opening = {"bos_token_id": tokenizer.opening[0]} if tokenizer.opening else {}
    return opening | {"eos_token_id": stops if len(stops) > 1 else stops[0]}


def tokenizer_files(tokenizer: Tokenizer, max_positions: int) -> dict[str, Any]:
    """Returns the files beside the weights that a tokenizer gives, by name.

    One that came with a model keeps its files byte for byte, and gets no others: how a
    chat is written and how to sample are the model's. One that came alone, or with a
    chat template, is described in tokenizer_config.json and generation_config.json.
    """
    beside = {name: x for name, x in tokenizer.files.items() if name != TOKENIZER}
    if describe_tokens(beside):
        return dict(tokenizer.files)
    opening = tokenizer.decode([tokenizer.eos_id])
    described = json.loads(tokenizer.files[TOKENIZER])
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
    return {
        # Nothing was cut or filled in training.
        TOKENIZER: described | {"truncation": None, "padding": None},
        TOKENIZER_CONFIG: config,
        GENERATION: token_ids(tokenizer) | SAMPLING,
        **beside,
    }


def _opens_with(token: str, token_id: int) -> dict[str, Any]:
    """Returns a post-processor that puts one token before a text."""
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
    """Returns README.md: what the model is, its run measured, how to load it."""
    router = cfg.moe.router
    architecture = families.lookup(cfg.family).architecture
    balanced = ""
    if not names.absent(cfg):  # else it has no selection biases
        balanced = f" with loss-free load balancing (rule `{router.update_rule}`)"
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

A `{architecture}`{parameters}: {cfg.num_layers} layers of {cfg.hidden_dim}
dimensions, {router.num_experts} routed experts of which each token visits
{router.top_k}, {cfg.mtp_depth} module(s) for multi-token prediction. A base model,
trained by jmoe{balanced}. Weights are
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
    """Returns the last value of each figure up to `step`."""
    found = {}
    for key, what in _FIGURES.items():
        values = [row[key] for row in rows if key in row and row["step"] <= step]
        if values:
            found[what] = _figure(values[-1])
    return found


def _figure(value: int | float | str) -> str:
    """Returns text; what isn't finite is a word in a run's files, and stays one."""
    if isinstance(value, str):
        return f"{value}: the run has diverged"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
