"""A tiny checkpoint of every family comes in and goes out again by the two programs."""

import json

import pytest
import tokenizers

from jmoe import families
from jmoe.checkpoint.workdir import read_run
from jmoe.config import records
from jmoe.export import names
from tests import parity
from tests.families.cases import TINY

pytest.importorskip("transformers", reason="its models are converted")
load_file = pytest.importorskip("safetensors.torch").load_file

BESIDE = {  # as models come with them: not as ours would be written
    "chat_template.jinja": "{{ messages[0]['content'] }}\r\n",
    "generation_config.json": '{"eos_token_id":[1, 2],  "temperature":0.6}',
    "special_tokens_map.json": '{"eos_token":"<end>"}\n\n',
    "tokenizer_config.json": '{"eos_token": "<end>", "add_bos_token": false}',
}


@pytest.fixture
def model(request, tmp_path):
    """A directory as transformers saves it, with the files of a tokenizer."""
    cfg = records.override(TINY[request.param], ["mtp_depth=0"])
    saved = parity.transformers_model(cfg, families.to_hf(cfg))
    saved.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": request.param}
    path.write_text(json.dumps(config))
    vocabulary = {"<start>": 0, "<end>": 1, "<turn>": 2, "word": 3, "<other>": 4}
    words = tokenizers.models.WordLevel(vocabulary, unk_token="<other>")
    tokenizers.Tokenizer(words).save(str(tmp_path / "theirs" / "tokenizer.json"))
    for name, text in BESIDE.items():
        (tmp_path / "theirs" / name).write_bytes(text.encode())
    return tmp_path / "theirs"


@pytest.mark.parametrize("model", TINY, indirect=True)
def test_what_came_in_goes_out_byte_by_byte_with_all_that_is_beside_it(
    model, script, tmp_path
):
    run, out = tmp_path / "run", tmp_path / "ours"
    for name, *arguments in (
        ("import_hf", f"--model={model}", f"--workdir={run}"),
        ("export_hf", f"--workdir={run}", f"--out={out}"),
    ):
        outcome = script(name, *arguments)
        assert outcome.code == 0, outcome.err
    theirs, ours = (load_file(x / "model.safetensors") for x in (model, out))
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        assert (x.dtype, x.tolist()) == (ours[name].dtype, ours[name].tolist()), name
    config, again = (json.loads((x / "config.json").read_text()) for x in (model, out))
    assert {key: again[key] for key in config} == config
    for name in (*BESIDE, "tokenizer.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("model", ["deepseek_v3", "qwen3_moe"], indirect=True)
def test_only_where_biases_can_go_out_again_does_a_run_move_them(
    model, script, tmp_path
):
    arguments = (f"--model={model}", f"--workdir={tmp_path / 'run'}")
    assert script("import_hf", *arguments).code == 0
    run = read_run(tmp_path / "run")
    assert (run.train.bias_rate.first > 0) == (not names.absent(run.model))
