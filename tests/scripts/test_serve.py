"""scripts/serve.py: a mistake is one line, told before anything starts."""

import importlib.util
import socket

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def directory(script, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "smallest"
    outcome = script("export_hf", f"--workdir={trained}", f"--out={out}")
    assert outcome.code == 0, outcome.err
    return out


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--model={}/nowhere", "nowhere' is not a directory."),
        ("--model={}/..", "holds no exported model: it lacks config.json, tokenizer"),
        ("--set=engine.tensor=2", "Unknown field 'engine.tensor'; known: dtype, "),
        ("--set=port=99999", "port=99999 must be at most 65535."),
        ("--local", "--local is for --engine=jax."),
        ("--step=3", "--step is for --engine=jax."),
    ],
)
def test_a_mistake_is_one_line_that_names_it(script, directory, argument, complaint):
    outcome = script("serve", f"--model={directory}", argument.format(directory))
    assert complaint in outcome.mistake()


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_an_environment_without_vllm_is_told_where_to_get_one(script, directory):
    outcome = script("serve", f"--model={directory}", "--mtp")
    expected = "scripts/make_serving_env.sh DIR makes an environment"
    assert expected in outcome.mistake()


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--model={}/nowhere", "holds neither a run nor an exported model"),
        ("--step=soon", "step='soon'"),
        ("--step=3", "step=3 is for runs"),
        ("--set=engine.weights=fp4", "weights='fp4' is not one of native"),
        ("--set=engine.max_length=9999", "max_length=9999 must be at most"),
        ("--set=host=0.0.0.0", "keys are needed"),
    ],
)
def test_a_mistake_with_our_own_engine_is_one_line_too(
    script, directory, argument, complaint
):
    own = ["--engine=jax", "--local", f"--model={directory}"]
    outcome = script("serve", *own, argument.format(directory))
    assert complaint in outcome.mistake()


def test_a_port_in_use_is_told_before_weights_are_read(script, directory, tmp_path):
    """There are none; who read them would say so."""
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    (tmp_path / "model.safetensors").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        own = ["--engine=jax", "--local", f"--model={tmp_path}"]
        told = script("serve", *own, f"--set=port={port}").mistake()
        assert f"port={port} can't be had on host='127.0.0.1': Address already" in told
