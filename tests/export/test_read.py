"""What other tools leave in a checkpoint is read, or refused by name."""

import json

import numpy as np
import pytest

from jmoe.export import hf, layout, safetensors

CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def read(directory):
    """The directory's tensors by name: (code, array of bytes in the tensor's shape)."""
    found = safetensors.read_headers(directory)
    return {
        name: np.frombuffer(x.file.read_bytes(), np.uint8)[x.offset :][: x.nbytes]
        .view(x.dtype)
        .reshape(x.shape)
        for name, x in found.items()
    }


def rewrite(directory, tensors):
    """Writes one file of these arrays in place of the directory's."""
    for path in directory.glob("model*"):
        path.unlink()
    header, data = {}, b""
    for name, x in tensors.items():
        code = "F8_E4M3" if x.dtype.itemsize == 1 else CODES[str(x.dtype)]
        end = len(data) + x.nbytes
        header[name] = dict(dtype=code, shape=x.shape, data_offsets=[len(data), end])
        data += x.tobytes()
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (directory / layout.SINGLE).write_bytes(content)


@pytest.fixture
def saved(small_config, draw, tmp_path):
    """Saves variables of the small shape; returns directory, variables and tensors."""

    def save(*assignments, **options):
        cfg = small_config(*assignments)
        hf.save(tmp_path / "hf", cfg, draw(cfg), **options)
        return tmp_path / "hf", hf.load(tmp_path / "hf")[1], read(tmp_path / "hf")

    return save


def test_rotary_frequencies_of_older_versions_are_passed_over(saved, same):
    directory, variables, tensors = saved()
    for number in range(3):
        name = f"model.layers.{number}.self_attn.rotary_emb.inv_freq"
        tensors[name] = np.ones(4, np.float32)
    rewrite(directory, tensors)
    same(hf.load(directory)[1], variables)


def test_a_head_beside_tied_embeddings_must_be_the_same(saved, same):
    directory, variables, tensors = saved("tie_embeddings=true")
    head = tensors["model.embed_tokens.weight"].copy()
    rewrite(directory, tensors | {"lm_head.weight": head})
    same(hf.load(directory)[1], variables)
    head[-1, -1] += 1
    rewrite(directory, tensors | {"lm_head.weight": head})
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tok"):
        hf.load(directory)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_block_scales_may_be_of_any_float_type(saved, same, dtype):
    directory, _, tensors = saved(fp8=True)
    for name in tensors:
        if name.endswith(layout.SCALE):
            # Powers of two are the same number in every type.
            exponent = np.round(np.log2(tensors[name]))
            tensors[name] = np.exp2(np.clip(exponent, -14, 0)).astype(np.float32)
    rewrite(directory, tensors)
    want = hf.load(directory)[1], hf.load(directory, fp8="keep")[1]
    for name in tensors:
        if name.endswith(layout.SCALE):
            tensors[name] = tensors[name].astype(dtype)
    rewrite(directory, tensors)
    same(hf.load(directory)[1], want[0])
    same(hf.load(directory, fp8="keep")[1], want[1])


def test_float16_weights_come_in_as_the_same_numbers(saved, same):
    directory, _, tensors = saved()
    halves = {name: x.astype(np.float16) for name, x in tensors.items()}
    rewrite(directory, {name: x.astype(np.float32) for name, x in halves.items()})
    want = [hf.load(directory, dtype=dtype)[1] for dtype in (None, "bfloat16")]
    rewrite(directory, halves)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"torch_dtype": "float16"})
    )
    same(hf.load(directory)[1], want[0])
    same(hf.load(directory, dtype="bfloat16")[1], want[1])


def fuse(tensors, prefix):
    """A layer's experts as transformers 5 has them in memory."""

    def stack(kind, suffix):
        names = [f"{prefix}.{e}.{kind}_proj.weight{suffix}" for e in range(6)]
        return np.stack([tensors.pop(name) for name in names])

    for suffix in ("", layout.SCALE):
        if f"{prefix}.0.gate_proj.weight{suffix}" in tensors:
            pair = stack("gate", suffix), stack("up", suffix)
            tensors[f"{prefix}.gate_up_proj{suffix}"] = np.concatenate(pair, axis=1)
            tensors[f"{prefix}.down_proj{suffix}"] = stack("down", suffix)


@pytest.mark.parametrize("fp8", [False, True])
def test_experts_that_are_stored_as_one_are_taken_apart(saved, same, fp8):
    directory, variables, tensors = saved("moe.expert_mlp_dim=128", fp8=fp8)
    for number in (1, 2, 3):
        fuse(tensors, f"model.layers.{number}.mlp.experts")
    assert sum(".experts." in name for name in tensors) == 3 * (4 if fp8 else 2)
    rewrite(directory, tensors)
    same(hf.load(directory)[1], variables)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(directory, tensors | {name: tensors[name][:-1]})
    with pytest.raises(ValueError, match="missing: model.layers.1.mlp.experts.5.gate"):
        hf.load(directory)
