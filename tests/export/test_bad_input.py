"""A mistake is one error that names it, and nothing is written."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.export import hf
from jmoe.export.export_run import export_run
from jmoe.export.import_run import import_run

EMBEDDING = "model.embed_tokens.weight"
MTP_EMBEDDING = "model.layers.3.embed_tokens.weight"


def quiet(_total):
    return lambda nbytes: None


@pytest.fixture(scope="module")
def whole_model(small_run, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    export_run(small_run, out, started=quiet, shard_bytes=300_000)
    return out


@pytest.fixture
def model(whole_model, tmp_path) -> pathlib.Path:
    """A directory of several files, all well."""
    return shutil.copytree(whole_model, tmp_path / "hf")


@pytest.fixture
def refused(model, tmp_path):
    """Importing fails with this message, and leaves nothing behind."""

    def check(complaint: str, kind: type[Exception] = ValueError, **options):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(kind, match=complaint) as error:
            import_run(model, tmp_path / "imported", started=quiet, **options)
        assert sorted(tmp_path.iterdir()) == before
        return str(error.value)

    return check


def shard(model: pathlib.Path, name: str = EMBEDDING) -> pathlib.Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][name]


def change_json(path: pathlib.Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_header(path: pathlib.Path, change) -> None:
    """Rewrites a safetensors file with another header and the same data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


@pytest.mark.parametrize("kept", [-1, 100_000, 5000, 7, 0])
def test_a_file_that_was_cut_short(model, refused, kept):
    path = shard(model)
    path.write_bytes(path.read_bytes()[:kept])
    refused(f"{path.name} is cut short")


def test_a_file_with_something_behind_its_last_tensor(model, refused):
    with shard(model).open("ab") as file:
        file.write(b"more")
    refused("goes on after its last tensor")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[EMBEDDING].pop("shape"),
        lambda header: header[EMBEDDING].update(data_offsets=[0, 8]),
        lambda header: header[EMBEDDING].update(shape=[1, 1]),
        lambda header: header.update({EMBEDDING: 3}),
    ],
)
def test_a_corrupt_header(model, refused, change):
    change_header(shard(model), change)
    refused("has a corrupt header")


def test_a_header_that_is_no_json(model, refused):
    data = bytearray(shard(model).read_bytes())
    data[8:12] = b"\xff\xfe\x00{"
    shard(model).write_bytes(data)
    refused("has a corrupt header")


def test_an_index_that_names_a_tensor_elsewhere_or_a_file_that_is_not_there(
    model, refused
):
    index = model / "model.safetensors.index.json"
    good = index.read_text()
    other = max(model.glob("*.safetensors")).name
    change_json(index, lambda x: x["weight_map"].update({EMBEDDING: other}))
    refused(f"index.json is wrong: .*{EMBEDDING} isn't in {other}")
    index.write_text(good)
    change_json(index, lambda x: x["weight_map"].pop(EMBEDDING))
    refused(f"index.json is wrong: {EMBEDDING} of model-00001.* is not in it")
    index.write_text(good)
    change_json(index, lambda x: x["weight_map"].update({EMBEDDING: "gone"}))
    refused("lacks 1 of the .* files .*: gone", FileNotFoundError)
    index.write_text("{")
    refused("index.json is not JSON")


def test_no_weights_at_all(model, refused):
    for path in model.glob("model*"):
        path.unlink()
    refused("has neither model.safetensors nor", FileNotFoundError)


def test_every_tensor_that_is_wrong_is_in_one_report(model, refused):
    def spoil(header):
        for name in list(header):
            if name == "model.norm.weight":
                header["model.norm.unknown"] = header.pop(name)
            if name == "lm_head.weight":
                header[name]["shape"].reverse()
            if name.endswith("mlp.gate.weight"):
                header[name].update(dtype="I32")

    for path in model.glob("*.safetensors"):
        change_header(path, spoil)
    index = model / "model.safetensors.index.json"
    index.unlink()
    merge_index(model, index)
    report = refused("is not the checkpoint that its config.json describes")
    for line in (
        "missing: model.norm.weight [162]",
        "unexpected: model.norm.unknown [162]",
        "misshapen: lm_head.weight [162, 300], not [300, 162]",
        "unreadable: model.layers.2.mlp.gate.weight I32, not F32 or BF16 or F16",
    ):
        assert f"\n  {line}" in report
    assert report.count("\n") == 3 + 3  # of the model's routers and MTP's


def merge_index(model: pathlib.Path, index: pathlib.Path) -> None:
    """An index that fits the files as they are."""
    weight_map = {}
    for path in model.glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        weight_map |= {name: path.name for name in header if name[0] != "_"}
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_mtp_layers_that_were_promised_and_dropped_are_explained(
    small_config, draw, tmp_path
):
    cfg = small_config("mtp_depth=0")
    hf.save(tmp_path / "hf", cfg, draw(cfg))
    promise = {"num_nextn_predict_layers": 1}
    change_json(tmp_path / "hf" / "config.json", lambda x: x.update(promise))
    with pytest.raises(ValueError, match="missing: model.layers.3.enorm") as error:
        hf.load(tmp_path / "hf")
    assert "set num_nextn_predict_layers to 0" in str(error.value)


def test_another_architecture(model, refused):
    change_json(model / "config.json", lambda x: x.update(model_type="llama"))
    refused("model_type='llama' is not a family of models that jmoe knows: deepseek_v3")


def test_a_tokenizer_that_is_missing_broken_or_too_large(model, refused):
    path = model / "tokenizer.json"
    good = path.read_text()
    path.unlink()
    refused("tokenizer.json': no such file", FileNotFoundError)
    path.write_text("{}")
    refused("is not a tokenizer.json")
    path.write_text(good.replace('"<|endoftext|>"', '"<|nothing|>"'))
    refused(r"beside it, eos_token='<\|endoftext\|>' is not in the vocabulary")


def test_no_config_and_no_directory(model, refused):
    (model / "config.json").unlink()
    refused("hf' has no config.json", FileNotFoundError)
    shutil.rmtree(model)
    refused("hf' is not a directory", FileNotFoundError)


def test_fp8_can_be_kept_only_where_it_is(refused):
    refused("fp8='keep', but .* has no FP8 weights", fp8="keep")
    refused("fp8='drop' is not one of 'dequantize', 'keep'", fp8="drop")


def test_an_mtp_module_with_an_embedding_of_its_own(model, refused):
    path = shard(model, MTP_EMBEDDING)
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + header[MTP_EMBEDDING]["data_offsets"][0] + 1000] ^= 1
    path.write_bytes(data)
    refused(f"{MTP_EMBEDDING} differs from {EMBEDDING}")


def change_tensor(path: pathlib.Path, name: str, change) -> None:
    """Rewrites a tensor of a safetensors file; `change` gets its bytes, to edit."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    first, end = json.loads(data[8:start])[name]["data_offsets"]
    own = np.frombuffer(data, np.uint8)[start + first : start + end]
    change(own)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.mlp.experts.5.up_proj.weight",
        "model.layers.0.self_attn.kv_b_proj.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(model, refused, name):
    path = shard(model, name)
    change_tensor(path, name, lambda own: own.view(np.float32)[-3:].fill(-np.inf))
    refused(f"{path.name}: NaN or infinite numbers in {name}")


@pytest.mark.parametrize("mode", ["dequantize", "keep"])
@pytest.mark.parametrize("suffix", ["", "_scale_inv"])
def test_fp8_weights_and_scales_that_are_not_finite_are_named(
    small_run, tmp_path, suffix, mode
):
    export_run(small_run, tmp_path / "hf", started=quiet, dtype="fp8")
    name = f"model.layers.1.mlp.experts.5.down_proj.weight{suffix}"
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    change_tensor(path, name, lambda own: own[-4:].fill(0xFF))
    with pytest.raises(ValueError, match=f"NaN or infinite numbers in {name}"):
        hf.load(tmp_path / "hf", fp8=mode)


@pytest.mark.parametrize("name", ["params/head", "router_state/moe/moe/router/bias"])
def test_variables_that_are_not_finite_are_named_and_not_written(
    small_config, draw, tmp_path, name
):
    cfg = small_config()

    def spoil(path, x):
        is_it = jax.tree_util.keystr(path, simple=True, separator="/") == name
        return x.at[-1, -1].set(jnp.nan) if is_it else x

    variables = jax.tree.map_with_path(spoil, draw(cfg))
    with pytest.raises(ValueError, match=f"Variables: NaN or .* numbers in {name}"):
        hf.save(tmp_path / "hf", cfg, variables)
    assert not list(tmp_path.iterdir())


def test_a_setting_that_does_not_exist(refused):
    refused("Unknown field 'train.stepz'", assignments=["train.stepz=3"])


@pytest.mark.parametrize("direction", ["export", "import"])
def test_a_directory_that_exists_is_left_alone(workdir, model, tmp_path, direction):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    convert = {"export": export_run, "import": import_run}[direction]
    source = {"export": workdir, "import": model}[direction]
    with pytest.raises(ValueError, match="taken' exists already; choose another"):
        convert(source, taken, started=quiet)
    taken.rename(tmp_path / "taken.partial")
    with pytest.raises(ValueError, match="taken.partial is in the way"):
        convert(source, taken, started=quiet)
    assert not taken.exists()
    left = [path.name for path in (tmp_path / "taken.partial").iterdir()]
    assert left == ["mine"]


def test_variables_of_another_model(small_config, draw, tmp_path):
    cfg = small_config()
    variables = draw(small_config("moe.expert_mlp_dim=32", "mtp_depth=0"))
    with pytest.raises(ValueError, match="The variables are not the model's") as error:
        hf.save(tmp_path / "hf", cfg, variables)
    found = re.findall(r"expected \((.*)\), found (.*)", str(error.value))
    assert ("2, 6, 162, 2, 33", "(2, 6, 162, 2, 32)") in found
    assert any(what == "nothing" for _, what in found)  # of MTP
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["a bit", "to NaN"])
def test_a_damaged_checkpoint_is_not_exported(workdir, tmp_path, damage):
    arrays = max(workdir.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = np.fromfile(arrays, np.uint8)
    middle = len(data) // 2
    if damage == "to NaN":
        data[middle : middle + 8] = 0xFF
    else:
        data[middle] ^= 1
    data.tofile(arrays)
    with pytest.raises(ValueError, match="checkpoints/7 is damaged: .* was altered"):
        export_run(workdir, tmp_path / "hf", started=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_without_what_an_export_needs(workdir, tmp_path):
    def fails(complaint, **options):
        with pytest.raises((ValueError, OSError), match=complaint):
            export_run(workdir, tmp_path / "hf", started=quiet, **options)

    fails("No checkpoint of step 3 in .*; found: 7", step=3)
    fails("dtype='float16' is not one of float32, bfloat16, fp8", dtype="float16")
    fails("shard_bytes=0 must be at least 1", shard_bytes=0)
    (workdir / "tokenizer.json").unlink()
    fails("tokenizer.json': no such file")
    (workdir / "config.json").unlink()
    fails("holds no run: it has no config.json")
