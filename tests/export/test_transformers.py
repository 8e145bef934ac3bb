"""transformers loads an export, and computes the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from jmoe import families
from jmoe.export import hf
from jmoe.export.export_run import export_run
from jmoe.export.import_run import import_run
from jmoe.nn.model import Transformer

torch = pytest.importorskip("torch", reason="compares with torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

YARN = "attention.yarn={'factor': 4.0, 'original_positions': 32}"
SHAPES = {
    "mtp": [],
    "yarn": [YARN, "mtp_depth=0", "layer_loop=unroll"],
    "full_queries": ["attention.query_latent_dim=none", "norm_eps=0.001"],
    "tied": ["tie_embeddings=true", "num_dense_layers=0"],
}


def logits(model, tokens_BT):
    model.set_experts_implementation("eager")  # the others want multiples of 16 bytes
    return model(torch.from_numpy(tokens_BT)).logits.detach().numpy()


@pytest.mark.parametrize("assignments", SHAPES.values(), ids=SHAPES)
def test_no_key_is_missing_or_unexpected_and_logits_are_equal(
    small_config, draw, tmp_path, assignments
):
    cfg = small_config(*assignments)
    variables = draw(cfg)
    hf.save(tmp_path / "hf", cfg, variables, shard_bytes=400_000)
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype="auto"
    )
    mtp = f"model.layers.{cfg.num_layers}."
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(mtp)]
    assert not info["missing_keys"] and not info["mismatched_keys"] and not unexpected
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 19))
    theirs = logits(model, tokens_BT)
    ours = np.asarray(Transformer(cfg).apply(variables, jnp.asarray(tokens_BT)).logits)
    assert np.abs(ours - theirs).max() < 1e-5 * max(1, np.abs(theirs).max())


def test_what_transformers_saved_comes_in_with_the_same_logits(small_config, tmp_path):
    cfg = small_config("mtp_depth=0")
    model = transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**families.to_hf(cfg))
    )
    model.save_pretrained(tmp_path / "hf")
    got_cfg, variables = hf.load(tmp_path / "hf")
    tokens_BT = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 19))
    theirs = logits(model, tokens_BT)
    ours = Transformer(got_cfg).apply(variables, jnp.asarray(tokens_BT)).logits
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-5


def test_a_chat_template_survives_the_way_in_and_out(workdir, tmp_path):
    export_run(workdir, tmp_path / "a", started=lambda _: lambda _: None)
    path = tmp_path / "a" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": "{{ messages[0]['role'] }}"}))
    import_run(tmp_path / "a", tmp_path / "run2", started=lambda _: lambda _: None)
    export_run(tmp_path / "run2", tmp_path / "b", started=lambda _: lambda _: None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    turns = [{"role": "someone", "content": "hello"}]
    assert theirs.apply_chat_template(turns, tokenize=False) == "someone"
    assert theirs("text")["input_ids"][0] == theirs.bos_token_id


FAMILIES = {  # the names of the special tokens, what opens a text, what ends it
    "deepseek": (("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<pad>"), 0, [1]),
    "chatml": (("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, [2, 0]),
    "llama3": (("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), 0, [1, 2]),
}


@pytest.mark.parametrize("specials, bos, stops", FAMILIES.values(), ids=FAMILIES)
def test_a_prompt_and_its_end_are_those_of_the_models_own_tokenizer(
    tmp_path, specials, bos, stops
):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello world"] * 9, trainer)
    names = {"eos_token": specials[stops[0]]}
    if bos is not None:
        names["bos_token"] = specials[bos]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{specials[bos]} $A", special_tokens=[(specials[bos], bos)]
        )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    theirs.save_pretrained(tmp_path)
    generation = transformers.GenerationConfig(bos_token_id=bos, eos_token_id=stops)
    generation.save_pretrained(tmp_path)
    ours = hf.Tokenizer.from_file(tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.prompt("hello world") == theirs("hello world").input_ids
    assert (ours.eos_id, ours.stop_ids) == (theirs.eos_token_id, tuple(stops))


def test_the_tokenizer_opens_a_text_as_training_does(workdir, tmp_path):
    export_run(workdir, tmp_path / "hf", started=lambda _: lambda _: None)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = hf.Tokenizer.from_file(workdir / "tokenizer.json")
    text = "some more text"
    assert theirs(text)["input_ids"] == [ours.eos_id, *ours.encode(text)]
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eos_id
    turns = [{"role": "user", "content": "hello"}]
    chat = theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat == "user: hello\nassistant:"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == ours.eos_id and generation.do_sample
