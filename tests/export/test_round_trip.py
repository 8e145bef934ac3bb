"""There and back: the same bits, whatever the type, the layer loop and the way."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jmoe import families
from jmoe.export import hf, names
from jmoe.export.export_run import export_run
from jmoe.export.import_run import import_run
from jmoe.export.read import Reader
from jmoe.nn.model import abstract_variables
from jmoe.train.trained import load_trained

FORMATS = ("float32", "bfloat16", "fp8")
SHARD = 150_000  # bytes: several files


def quiet(_total):
    return lambda nbytes: None


export_quietly = functools.partial(export_run, started=quiet, shard_bytes=SHARD)
import_quietly = functools.partial(import_run, started=quiet)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("shard_bytes", [SHARD, 10**9])
def test_variables_come_back_bit_by_bit(
    small_config, draw, same, tmp_path, dtype, loop, shard_bytes
):
    cfg = small_config(f"layer_loop={loop}", f"dtype={dtype}")
    variables = draw(cfg, dtype)
    hf.save(tmp_path / "hf", cfg, variables, shard_bytes=shard_bytes)
    got_cfg, got = hf.load(tmp_path / "hf")
    same(got, variables)
    assert dataclasses.replace(got_cfg, hf_extras="{}") == cfg


@pytest.mark.parametrize("written_as", FORMATS)
def test_a_checkpoint_comes_back_byte_by_byte(
    small_config, draw, contents, tmp_path, written_as
):
    cfg = small_config("tie_embeddings=true", "num_dense_layers=0")
    dtype = "float32" if written_as == "fp8" else written_as
    hf.save(tmp_path / "a", cfg, draw(cfg, dtype), fp8=written_as == "fp8")
    kept = {"fp8": "keep"} if written_as == "fp8" else {}
    got_cfg, variables = hf.load(tmp_path / "a", **kept)
    hf.save(tmp_path / "b", got_cfg, variables, shard_bytes=SHARD)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    config = [json.loads((tmp_path / x / "config.json").read_text()) for x in "ab"]
    assert config[0] == config[1]
    assert ("quantization_config" in config[0]) == (written_as == "fp8")


@pytest.mark.parametrize("written_as", FORMATS)
def test_a_run_goes_out_and_comes_in_byte_by_byte(
    workdir, contents, same, tmp_path, written_as
):
    export_quietly(workdir, tmp_path / "a", dtype=written_as)
    kept = "keep" if written_as == "fp8" else "dequantize"
    import_quietly(tmp_path / "a", tmp_path / "imported", fp8=kept)
    export_quietly(tmp_path / "imported", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    if written_as == "float32":
        was, now = load_trained(workdir), load_trained(tmp_path / "imported")
        same(now.variables, was.variables)
        text = "some text, and more"
        assert now.tokenizer.encode(text) == was.tokenizer.encode(text)
        assert (now.run.model.dtype, now.step) == (was.run.model.dtype, 0)
        weights = (was.run.initial_weights, now.run.initial_weights)
        assert weights == ("random", "imported")


SIDECARS = {  # as other tools write them: not as ours would
    "tokenizer_config.json": b'{"eos_token":"<|endoftext|>",  "bos_token":null}\n\n',
    "generation_config.json": b'{"eos_token_id":[0, 7],\r\n"temperature":0.6}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": "{# \u4f60 #}{{ messages }}\r\n".encode(),
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "tokenizer.json": None,
}


def test_what_belongs_to_the_tokenizer_goes_in_and_out_byte_by_byte(workdir, tmp_path):
    first = tmp_path / "a"
    export_quietly(workdir, first)
    settings = json.loads((first / "tokenizer.json").read_text())
    settings["truncation"] = {"max_length": 8, "stride": 0, "direction": "Right"}
    settings["truncation"]["strategy"] = "LongestFirst"
    given = SIDECARS | {"tokenizer.json": json.dumps(settings, indent=1).encode()}
    for name, content in given.items():
        (first / name).parent.mkdir(exist_ok=True)
        (first / name).write_bytes(content)
    import_quietly(first, tmp_path / "imported")
    export_quietly(tmp_path / "imported", tmp_path / "b")
    weights = "README.md", "config.json", "*.safetensors", "*.index.json"
    for directory in ("imported", "b"):
        found = {name: (tmp_path / directory / name).read_bytes() for name in given}
        assert found == given
    left = {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*.*")}
    left -= {
        p.relative_to(tmp_path / "b") for w in weights for p in (tmp_path / "b").glob(w)
    }
    assert {path.as_posix() for path in left} == set(given)
    tokenizer = load_trained(tmp_path / "imported").tokenizer
    assert tokenizer.stop_ids == (0, 7)
    assert tokenizer.prompt("text, " * 9) == [0, *tokenizer.encode("text, " * 9)]


def test_where_only_the_config_says_the_stops_they_are_kept_too(workdir, tmp_path):
    export_quietly(workdir, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"bos_token_id": None, "eos_token_id": [5, 6]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    for name in ("generation_config.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    import_quietly(tmp_path / "a", tmp_path / "imported")
    assert load_trained(tmp_path / "imported").tokenizer.stop_ids == (5, 6)
    export_quietly(tmp_path / "imported", tmp_path / "b")
    again = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (again["bos_token_id"], again["eos_token_id"]) == (None, [5, 6])


def test_safetensors_own_library_reads_the_same(workdir, contents, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    export_quietly(workdir, tmp_path / "a", dtype="fp8")
    ours = contents(tmp_path / "a")
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    theirs = {}
    for file in set(index["weight_map"].values()):
        theirs |= safetensors.load_file(tmp_path / "a" / file)
    assert index["weight_map"].keys() == ours.keys() == theirs.keys()
    assert index["metadata"]["total_size"] == sum(len(x) for _, _, x in ours.values())
    for name, x in theirs.items():
        assert tuple(x.shape) == ours[name][1]
        assert x.view(torch.uint8).numpy().tobytes() == ours[name][2], name


def test_fp8_is_within_its_error_of_the_weights_and_the_rest_is_bfloat16(
    small_config, draw, tmp_path
):
    cfg = small_config()
    variables = draw(cfg)
    hf.save(tmp_path / "hf", cfg, variables, fp8=True)
    _, got = hf.load(tmp_path / "hf", dtype="float32")
    products = {t.path for t in names.expand(cfg) if t.is_product}
    for path, want in names.manifest.flatten(variables).items():
        x = names.manifest.flatten(got)[path]
        if path in products:
            assert np.abs(x - want).max() <= np.abs(want).max() / 16, path
        elif path.startswith("params"):
            np.testing.assert_array_equal(x, want.astype(jnp.bfloat16).astype("f4"))
        else:
            np.testing.assert_array_equal(x, want)


def test_a_torch_file_holds_the_same_tensors(workdir, contents, tmp_path):
    torch = pytest.importorskip("torch")
    from jmoe.export.torch_file import export_torch

    for dtype in FORMATS:
        export_quietly(workdir, tmp_path / dtype, dtype=dtype)
        export_torch(workdir, tmp_path / f"{dtype}.pt", started=quiet, dtype=dtype)
        state = torch.load(tmp_path / f"{dtype}.pt")
        wanted = contents(tmp_path / dtype)
        assert state.keys() == wanted.keys()
        for name, x in state.items():
            assert x.reshape(-1).view(torch.uint8).numpy().tobytes() == wanted[name][2]
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".pt"] * 3


@pytest.mark.parametrize("fp8", ["dequantize", "keep"])
@pytest.mark.parametrize(
    "dims", [("expert",), ("tensor",), ("expert", "tensor")], ids=str
)
def test_shards_on_a_mesh_hold_what_one_device_holds(
    small_config, draw, tmp_path, dims, fp8
):
    cfg = small_config("hidden_dim=256", "moe.expert_mlp_dim=64", "vocab_size=304")
    hf.save(tmp_path / "hf", cfg, draw(cfg), fp8=True)
    mesh = jax.make_mesh((2, 4), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def place(path, x):
        spec = [None] * x.ndim
        if "expert" in dims and "experts" in jax.tree_util.keystr(path):
            spec[1 if x.ndim == 5 else x.ndim - 3] = "expert"
        if "tensor" in dims and x.shape[-1] % 4 == 0:
            spec[-1] = "tensor" if x.ndim < 4 or "gate_up" in str(path) else None
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, abstract_variables(cfg))
    _, whole = hf.load(tmp_path / "hf", fp8=fp8)
    _, parts = hf.load(tmp_path / "hf", fp8=fp8, shardings=shardings)
    for x, y in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    gate_up = parts["params"]["moe"]["moe"]["experts"]["gate_up"]
    assert gate_up.sharding == shardings["params"]["moe"]["moe"]["experts"]["gate_up"]
    assert not gate_up.is_fully_replicated


def bytes_read() -> int:
    """By this process, from files, whatever the page cache holds."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_a_part_costs_its_own_bytes(small_config, draw, tmp_path):
    cfg = small_config("moe.expert_mlp_dim=640", "moe.router.num_experts=8")
    hf.save(tmp_path / "hf", cfg, draw(cfg))
    path = "params/moe/moe/experts/gate_up"
    with Reader(tmp_path / "hf") as reader:
        shape = reader.leaves[path].shape
        whole = tuple(slice(0, n) for n in shape)
        reader.read(path, tuple(slice(0, 1) for _ in shape))  # opens the file
        part = (slice(1, 2), slice(3, 5), *whole[2:])
        before = bytes_read()
        x = reader.read(path, part)
        assert x.nbytes <= bytes_read() - before < 1.1 * x.nbytes


def test_the_config_says_what_serving_needs(workdir, tmp_path):
    export_quietly(workdir, tmp_path / "hf", dtype="bfloat16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["topk_method"] == "noaux_tc" and config["moe_layer_freq"] == 1
    assert config["scoring_func"] == "sigmoid"
    assert config["eos_token_id"] == config["bos_token_id"] == 0
    assert config["num_nextn_predict_layers"] == 1
    assert families.from_hf(config).num_layers == 3
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| validation loss, nats a token | 2.5 |" in card  # of step 7, not of 8
    assert "| training steps | 7 |" in card
