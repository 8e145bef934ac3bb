"""A tiny model of every family computes what transformers' does, both ways on disk."""

import dataclasses

import jax
import numpy as np
import pytest

from jmoe import families
from jmoe.config import records
from jmoe.export import hf, names
from tests import parity
from tests.families.cases import TINY
from tests.parity import (
    by_expert,
    exportable_variables,
    hf_tensors,
    relative_error,
)

torch = pytest.importorskip("torch", reason="compares with torch")
pytest.importorskip("transformers", reason="compares with transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

TOLERANCE = 1e-5


def loaded(cfg, directory, **options):
    """Their model of an export; the class has its own name of the family."""
    architecture = parity.architecture(cfg)
    config = architecture.config_class.from_pretrained(directory)
    config.model_type = architecture.config_class.model_type
    return architecture.from_pretrained(
        directory, config=config, dtype="auto", **options
    )


@pytest.fixture(scope="module", params=TINY)
def cfg(request):
    return TINY[request.param]


def tokens(cfg):
    return np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 19))


@pytest.fixture(scope="module")
def measured(cfg):
    """The same model on both sides: (jmoe's, transformers'), theirs without MTP."""
    variables = exportable_variables(cfg)
    state = hf_tensors(variables, cfg)
    mtp = f"model.layers.{cfg.num_layers}."
    own = {name: x for name, x in state.items() if not name.startswith(mtp)}
    theirs = parity.run_transformers(cfg, own, tokens(cfg))
    return parity.run_jmoe(cfg, variables, tokens(cfg)), theirs


def test_logits_loss_and_all_gradients_are_equal(measured):
    ours, theirs = measured
    assert relative_error(ours.logits, theirs.logits) < TOLERANCE
    assert relative_error(ours.loss, theirs.loss) < TOLERANCE
    for name, gradient in theirs.gradients.items():
        assert relative_error(ours.gradients[name], gradient) < TOLERANCE, name


def test_every_router_chooses_the_same_experts_with_the_same_gates(measured):
    ours, theirs = measured
    assert ours.routing
    for got, want in zip(ours.routing, theirs.routing, strict=True):
        (got_NK, got_gate_NK), (want_NK, want_gate_NK) = map(by_expert, (got, want))
        np.testing.assert_array_equal(got_NK, want_NK)
        assert relative_error(got_gate_NK, want_gate_NK) < TOLERANCE


def test_an_export_loads_with_no_missing_and_no_unexpected_key(cfg, tmp_path):
    hf.save(tmp_path / "hf", cfg, exportable_variables(cfg), shard_bytes=20_000)
    _, info = loaded(cfg, tmp_path / "hf", output_loading_info=True)
    mtp = f"model.layers.{cfg.num_layers}."  # which no family's class has
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith(mtp)]
    assert not info["missing_keys"] and not info["mismatched_keys"] and not unexpected


def test_what_transformers_saved_comes_back_byte_by_byte(cfg, tmp_path):
    cfg = records.override(cfg, ["mtp_depth=0"])
    model = parity.transformers_model(cfg, families.to_hf(cfg))
    model.save_pretrained(tmp_path / "theirs")
    got_cfg, variables = hf.load(tmp_path / "theirs")
    hf.save(tmp_path / "ours", got_cfg, variables)
    theirs, ours = (
        load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours")
    )
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        assert (x.dtype, x.tolist()) == (ours[name].dtype, ours[name].tolist()), name


def test_variables_come_back_bit_by_bit_with_mtp_modules_and_stacked_layers(
    cfg, tmp_path
):
    cfg = records.override(cfg, ["layer_loop=scan"])
    variables = exportable_variables(cfg)
    hf.save(tmp_path / "hf", cfg, variables)
    got_cfg, got = hf.load(tmp_path / "hf")
    assert dataclasses.replace(got_cfg, hf_extras="{}") == cfg
    assert jax.tree.structure(got) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_biases_that_the_files_cannot_hold_are_not_lost_in_silence(cfg, tmp_path):
    absent = names.absent(cfg)
    if not absent:
        hf.save(tmp_path / "hf", cfg, parity.random_variables(cfg))
        return
    with pytest.raises(ValueError, match="no selection biases. Train without") as error:
        hf.save(tmp_path / "hf", cfg, parity.random_variables(cfg))
    assert absent[0] in str(error.value) and cfg.family in str(error.value)
    assert not (tmp_path / "hf").exists()


WITH_MTP = [name for name in TINY if TINY[name].mtp_depth]


@pytest.mark.parametrize("cfg", WITH_MTP, indirect=True)
def test_an_mtp_module_computes_what_transformers_makes_of_the_export(
    cfg, measured, tmp_path
):
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("transformers computes MTP modules since 5.24")
    hf.save(tmp_path / "hf", cfg, exportable_variables(cfg))
    model = loaded(cfg, tmp_path / "hf")
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{cfg.num_layers}\."]
    mtp = layers.MtpModel.from_pretrained(model)
    for either in (model, mtp):
        either.set_attn_implementation("eager")
        either.set_experts_implementation("eager")
    tokens_BT = torch.from_numpy(tokens(cfg))
    hidden = model.model(tokens_BT, use_cache=False).last_hidden_state
    at = torch.arange(18)[None].expand(2, 18)
    theirs = mtp.forward_layer(0, hidden[:, :-1], at, None, input_ids=tokens_BT[:, 1:])
    (ours,) = measured[0].mtp
    assert relative_error(ours[:, :-1], theirs.detach().numpy()) < TOLERANCE
