"""Records to JSON and back, and assignments from the command line."""

import json

import pytest

from jmoe.config import records
from jmoe.config.attention import GQAConfig, YarnConfig
from jmoe.config.data import SourceConfig
from jmoe.config.model import ModelConfig, RouterConfig
from jmoe.config.presets import RUNS
from jmoe.config.run import RunConfig
from jmoe.config.train import StepwiseConfig
from tests.plain_run import plain_run

YARN = "model.attention.yarn={'factor': 4, 'original_positions': 256}"
GQA = (
    "model.attention.kind=gqa",
    "model.attention.num_kv_heads=2",
    "model.attention.head_dim=32",
)


def overridden(*assignments):
    return records.override(plain_run(), assignments)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(
    "assignments",
    [
        [],
        [YARN, "model.attention.query_latent_dim=none"],
        ["data.sources=[{'path': 'a.txt'}, {'path': 'b.txt', 'weight': 2}]"],
        ["optimizer.clip_norm=inf", "optimizer.schedule.boundaries=[0.1, 0.2, 0.3]"],
        ["optimizer.epsilon=1.0000000000000002e-08", "name='run 1'"],
        [*GQA, "model.attention.qk_norm_eps=1e-5", YARN],
    ],
)
def test_a_run_survives_json(name, assignments):
    run = records.override(RUNS[name](), assignments)
    text = json.dumps(records.to_dict(run))
    assert records.from_dict(RunConfig, json.loads(text)) == run


def test_dicts_hold_nothing_but_json_values():
    got = records.to_dict(overridden())
    assert isinstance(got["data"]["sources"], list)
    assert got["model"]["attention"]["yarn"] is None
    assert got == json.loads(json.dumps(got))


def test_left_out_fields_take_their_defaults():
    got = records.from_dict(RouterConfig, {"num_experts": 8, "top_k": 2})
    assert got == RouterConfig(num_experts=8, top_k=2)


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "RouterConfig lacks num_experts, top_k."),
        ({"num_experts": 8}, "RouterConfig lacks top_k."),
        ({"num_experts": 8, "top_k": True}, "top_k=True must be of type int."),
        ({"num_experts": 8, "top_k": 2.0}, "top_k=2.0 must be of type int."),
        ({"num_experts": 8, "top_k": None}, "top_k=None must be of type int."),
        ({"num_experts": "8", "top_k": 2}, "num_experts='8' must be of type int."),
    ],
)
def test_a_missing_field_or_a_wrong_type_is_refused_by_name(values, said):
    with pytest.raises(ValueError) as error:
        records.from_dict(RouterConfig, values)
    assert str(error.value) == said


def test_a_field_missing_deep_inside_is_named_with_its_record():
    values = records.to_dict(plain_run())
    del values["model"]["moe"]["router"]["top_k"]
    with pytest.raises(ValueError, match=r"^model\.moe\.router lacks top_k\.$"):
        records.from_dict(RunConfig, values)


@pytest.mark.parametrize(
    "assignment, get, value",
    [
        ("name=first", lambda run: run.name, "first"),
        ("name='7'", lambda run: run.name, "7"),
        ("name=a=b", lambda run: run.name, "a=b"),
        ("name={[]: 1}", lambda run: run.name, "{[]: 1}"),
        ("train.steps=700", lambda run: run.train.steps, 700),
        ("train.ramp_start=8", lambda run: run.train.ramp_start, 8),
        ("train.ramp_start=none", lambda run: run.train.ramp_start, None),
        ("train.ramp_start=None", lambda run: run.train.ramp_start, None),
        ("optimizer.schedule.peak=1", lambda run: run.optimizer.schedule.peak, 1.0),
        ("optimizer.clip_norm=inf", lambda run: run.optimizer.clip_norm, float("inf")),
        ("model.tie_embeddings=true", lambda run: run.model.tie_embeddings, True),
        ("model.tie_embeddings=False", lambda run: run.model.tie_embeddings, False),
        ("model.moe.router.top_k=2", lambda run: run.model.moe.router.top_k, 2),
        (
            "optimizer.schedule.boundaries=(0, 0.5, 1)",
            lambda run: run.optimizer.schedule.boundaries,
            (0.0, 0.5, 1.0),
        ),
        (
            "optimizer.schedule.boundaries.2=1",
            lambda run: run.optimizer.schedule.boundaries,
            (0.676, 0.966, 1.0),
        ),
        (
            "train.bias_rate={'first': 0.1, 'last': 0}",
            lambda run: run.train.bias_rate,
            StepwiseConfig(first=0.1, last=0.0),
        ),
        (
            "data.sources=[{'path': 'a.txt', 'weight': 3}]",
            lambda run: run.data.sources,
            (SourceConfig(path="a.txt", weight=3.0),),
        ),
        ("data.sources.1.weight=2", lambda run: run.data.sources[1].weight, 2.0),
        (
            "data.sources.1={'path': 'b.txt'}",
            lambda run: run.data.sources[1],
            SourceConfig(path="b.txt"),
        ),
        (YARN, lambda run: run.model.attention.yarn.factor, 4.0),
    ],
)
def test_an_assignment_sets_one_field(assignment, get, value):
    got = get(overridden(assignment))
    assert got == value
    assert type(got) is type(value)


def test_an_assignment_leaves_all_else_alone():
    run = overridden("train.steps=700", "data.sources.0.weight=5")
    back = records.override(run, ["train.steps=600", "data.sources.0.weight=0.5"])
    assert back == plain_run()


def test_a_record_set_from_none_takes_further_assignments():
    run = overridden(YARN, "model.attention.yarn.beta_fast=16")
    yarn = YarnConfig(factor=4.0, original_positions=256, beta_fast=16.0)
    assert run.model.attention.yarn == yarn
    assert records.override(run, ["model.attention.yarn=none"]) == plain_run()


def test_another_kind_keeps_what_both_have_and_takes_further_assignments():
    before, after = plain_run().model.attention, overridden(*GQA).model.attention
    assert after == GQAConfig(
        num_heads=before.num_heads,
        num_kv_heads=2,
        head_dim=32,
        rope_dim=before.rope_dim,
        rope_theta=before.rope_theta,
        block_size=before.block_size,
    )
    assert overridden(*GQA, "model.attention.rope_dim=8").model.attention.rope_dim == 8


def test_a_record_set_whole_is_of_the_kind_that_it_says():
    attention = overridden(*GQA).model.attention
    whole = f"model.attention={records.to_dict(attention)}"
    assert overridden(whole) == overridden(*GQA)


def test_a_record_that_does_not_say_its_kind_is_of_the_first():
    """As the records of version 0.1 don't."""
    values = records.to_dict(plain_run())
    assert values["model"]["attention"].pop("kind") == "mla"
    assert values["model"]["moe"].pop("kind") == "moe"
    assert records.from_dict(RunConfig, values) == plain_run()


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (
            ["model.attention.kind=mha"],
            "model.attention.kind='mha' is not one of 'mla', 'gqa'.",
        ),
        (["model.attention.kind=[]"], "model.attention.kind=[] is not one of 'mla', "),
        (["model.attention={'kind': 'mha'}"], "kind='mha' is not one of 'mla', 'gqa'."),
        (GQA[:2], "model.attention lacks head_dim."),
        (GQA[1:], "It is a field of kind='gqa'."),
        ([*GQA, "model.attention.nope_dim=8"], "It is a field of kind='mla'."),
        (
            ["model.attention={'num_kv_heads': 2}"],
            "Unknown field 'model.attention.num_kv_heads'; known: kind, num_heads, "
            "query_latent_dim, kv_latent_dim, nope_dim, rope_dim, value_dim, "
            "rope_theta, yarn, latent_norm_eps, block_size. It is a field of "
            "kind='gqa'.",
        ),
        (
            ["model.attention=gqa"],
            "model.attention='gqa' must be a record of MLAConfig or GQAConfig.",
        ),
        ([*GQA, "model.attention.kind.x=1"], "attention.kind is a plain value"),
        (["model.moe.kind=dense"], "kind='dense' is not one of 'moe'."),
    ],
)
def test_what_is_of_no_kind_or_of_another_is_refused(assignments, said):
    with pytest.raises(ValueError) as error:
        overridden(*assignments)
    assert said in str(error.value)


@pytest.mark.parametrize("order", [1, -1])
def test_assignments_are_validated_only_together(order):
    run = overridden(*["train.batch_size=6", "train.microbatch_size=3"][::order])
    assert (run.train.batch_size, run.train.microbatch_size) == (6, 3)


def test_the_last_of_several_assignments_counts():
    assert overridden("train.steps=601", "train.steps=602").train.steps == 602


@pytest.mark.parametrize(
    "assignment, said",
    [
        ("train.steps", "--set 'train.steps' must read path.to.field=value."),
        ("", "--set '' must read path.to.field=value."),
        (
            "=3",
            "Unknown field ''; known: name, model, data, train, optimizer, "
            "schedule, mesh, pipeline, precision, initial_weights, monitor.",
        ),
        (
            "trian.steps=3",
            "Unknown field 'trian'; known: name, model, data, train, optimizer, "
            "schedule, mesh, pipeline, precision, initial_weights, monitor. "
            "Did you mean 'train'?",
        ),
        ("train.steps.x=3", "train.steps is a plain value; it has no field 'x'."),
        (
            "model.attention.yarn.factor=4",
            "model.attention.yarn=None must be a record to have a 'factor'.",
        ),
        (
            "data.sources.3.weight=2",
            "Unknown field 'data.sources.3'; known: 0, 1, 2.",
        ),
        (
            "data.sources.0.wieght=2",
            "Unknown field 'data.sources.0.wieght'; known: path, weight, text_field. "
            "Did you mean 'weight'?",
        ),
        (
            "data.sources=[{'file': 'a.txt'}]",
            "Unknown field 'data.sources[0].file'; known: path, weight, text_field.",
        ),
        ("data.sources=a.txt", "data.sources='a.txt' must be a list."),
        (
            "data.sources=['a.txt']",
            "data.sources[0]='a.txt' must be a record of SourceConfig.",
        ),
        (
            "optimizer.schedule.boundaries=[0.5]",
            "optimizer.schedule.boundaries=[0.5] must hold 3 values.",
        ),
        (
            "model.attention.yarn={'factor': 4}",
            "model.attention.yarn lacks original_positions.",
        ),
        ("model.moe=dense", "model.moe='dense' must be a record of MoEConfig."),
        ("train.steps=many", "train.steps='many' must be of type int."),
        ("train.steps=1.5", "train.steps=1.5 must be of type int."),
        ("train.steps=true", "train.steps=True must be of type int."),
        ("train.steps=none", "train.steps='none' must be of type int."),
        ("name=7", "name=7 must be of type str."),
        ("model.tie_embeddings=1", "model.tie_embeddings=1 must be of type bool."),
        ("optimizer.beta1=false", "optimizer.beta1=False must be of type float."),
        ("optimizer.beta1=true", "optimizer.beta1=True must be of type float."),
        (
            "model.attention.query_latent_dim=a",
            "model.attention.query_latent_dim='a' must be of type int.",
        ),
    ],
)
def test_a_wrong_assignment_is_refused_by_name(assignment, said):
    with pytest.raises(ValueError) as error:
        overridden(assignment)
    assert str(error.value) == said


def test_an_unknown_field_deep_inside_is_named_by_its_whole_path():
    with pytest.raises(ValueError) as error:
        overridden("model.moe.router.topk=2")
    assert "Unknown field 'model.moe.router.topk'" in str(error.value)
    assert "Did you mean 'top_k'?" in str(error.value)


def test_an_override_leaves_the_record_it_was_given_unchanged():
    tiny = ModelConfig.preset("tiny")
    records.override(tiny, ["num_layers=2"])
    assert tiny == ModelConfig.preset("tiny")


def test_the_word_none_is_a_value_where_a_field_takes_words():
    run = records.override(plain_run(), ["model.remat=none"])
    assert run.model.remat == "none"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("train.seed=99999999999999999999", "train.seed=9+ must fit into 64 bits"),
        ("train.seed=4294967296", "seed=4294967296 must be at most 4294967295"),
        ("train.seed=-1", "seed=-1 must be at least 0"),
        ("data.seed=4294967296", "seed=4294967296 must be at most 4294967295"),
        ("train.steps=2147483648", "steps=2147483648 must be at most 2147483647"),
        ("name=\udcff", r"name='\\udcff' must be UTF-8"),
        ("data={1: 2}", "Unknown field 'data.1'"),
        ("train.steps=" + "-" * 20_000 + "1", "must be of type int"),
    ],
)
def test_what_no_record_can_hold_is_refused(assignment, said):
    with pytest.raises(ValueError, match=said):
        records.override(plain_run(), [assignment])


def test_a_list_is_no_record():
    with pytest.raises(ValueError, match="must be a record of RunConfig"):
        records.from_dict(RunConfig, [1])


def test_a_value_is_never_evaluated():
    run = records.override(plain_run(), ["name=__import__('os').getcwd()"])
    assert run.name == "__import__('os').getcwd()"
