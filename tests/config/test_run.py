"""The run's records: DeepSeek-V3's schedule as their defaults, and what they refuse."""

import math

import pytest

from jmoe.config import records
from jmoe.config.run import ScheduleConfig
from jmoe.config.train import MOST_SIZES, TrainConfig
from tests.plain_run import plain_run

# Ten sizes, if it were by one microbatch at a time.
RAMP = ("train.batch_size=80", "train.ramp_start=8", "train.ramp_steps=100")


@pytest.mark.parametrize(
    "assignments, said",
    [
        (["train.steps=0"], "steps=0 must be at least 1."),
        (["train.batch_size=0"], "batch_size=0 must be at least 1."),
        (["train.microbatch_size=0"], "microbatch_size=0 must be at least 1."),
        (
            ["train.microbatch_size=3"],
            "batch_size=8 must be a positive multiple of microbatch_size=3.",
        ),
        (
            ["train.batch_size=6", "train.microbatch_size=4"],
            "batch_size=6 must be a positive multiple of microbatch_size=4.",
        ),
        (
            ["train.ramp_start=4"],
            "ramp_start=4 must be a positive multiple of microbatch_size=8.",
        ),
        (
            ["train.ramp_start=0"],
            "ramp_start=0 must be a positive multiple of microbatch_size=8.",
        ),
        (["train.ramp_start=16"], "ramp_start=16 must be at most batch_size=8."),
        (["train.ramp_steps=-1"], "ramp_steps=-1 must be at least 0."),
        (
            ["train.batch_size=16", "train.ramp_start=8"],
            "ramp_steps=0 must be at least 1 with ramp_start=8.",
        ),
        (
            [*RAMP, "train.ramp_increment=12"],
            "ramp_increment=12 must be a positive multiple of microbatch_size=8.",
        ),
        (
            [*RAMP, "train.ramp_increment=0"],
            "ramp_increment=0 must be a positive multiple of microbatch_size=8.",
        ),
        (
            [*RAMP, "train.ramp_increment=8"],
            "ramp_increment=8 makes 10 sizes of batches from ramp_start=8 to "
            "batch_size=80, each a program of its own; at most 8 may be: "
            "ramp_increment=16, or none.",
        ),
        (
            [*RAMP, "train.ramp_steps=601"],
            "train.ramp_steps=601 must be at most the 600 steps that schedules are "
            "planned over (schedule.steps).",
        ),
        (["train.signal_every=0"], "signal_every=0 must be at least 1."),
        (["schedule.steps=0"], "steps=0 must be at least 1."),
        (
            ["schedule.beyond=restart"],
            "beyond='restart' is not one of 'refuse', 'hold'.",
        ),
        (
            ["schedule.steps=599"],
            "train.steps=600 exceeds schedule.steps=599, which learning rate, bias "
            "rate and MTP weight are planned over. Either schedule.beyond=hold keeps "
            "their last values, or schedule.steps=600 plans them anew.",
        ),
        (["train.loss_chunk=0"], "loss_chunk=0 must be at least 1."),
        (["train.log_every=0"], "log_every=0 must be at least 1."),
        (["train.eval_every=0"], "eval_every=0 must be at least 1."),
        (["train.eval_batches=0"], "eval_batches=0 must be at least 1."),
        (["train.checkpoint_every=0"], "checkpoint_every=0 must be at least 1."),
        (["train.keep_checkpoints=0"], "keep_checkpoints=0 must be at least 1."),
        (["train.keep_best=-1"], "keep_best=-1 must be at least 0."),
        (["train.keep_every=0"], "keep_every=0 must be at least 1."),
        (["train.max_roll_backs=0"], "max_roll_backs=0 must be at least 1."),
        (
            ["train.checkpoint_minutes=-1"],
            "checkpoint_minutes=-1.0 must be at least 0.0.",
        ),
        (["train.checkpoint_minutes=inf"], "checkpoint_minutes=inf must be finite."),
        (["train.bias_rate.first=-1"], "first=-1.0 must be at least 0.0."),
        (["train.bias_rate.last=-1"], "last=-1.0 must be at least 0.0."),
        (
            ["train.bias_rate_factors=[{'layers': '*', 'factor': -1}]"],
            "factor=-1.0 must be at least 0.0.",
        ),
        (
            [
                "train.bias_rate_factors="
                "[{'layers': '*', 'factor': 0}, {'layers': 'moe_9', 'factor': 1}]"
            ],
            "train.bias_rate_factors[1].layers='moe_9' matches none of the layers with "
            "experts, moe_0 to mtp_0.",
        ),
        (["train.mtp_weight.switch=-0.5"], "switch=-0.5 must be at least 0.0."),
        (["train.mtp_weight.switch=2"], "switch=2.0 must be at most 1.0."),
        (["optimizer.name=sgd"], "name='sgd' is not one of 'adamw', 'muon'."),
        (
            ["optimizer.moment_dtype=float16"],
            "moment_dtype='float16' is not one of 'float32', 'bfloat16'.",
        ),
        (
            ["optimizer.muon_scale=rmsd"],
            "muon_scale='rmsd' is not one of 'rms', 'spectral'.",
        ),
        (
            ["optimizer.moment_dtype=bfloat16", "optimizer.beta2=0.998"],
            "beta2=0.998 must be at most 0.9921875 with moment_dtype='bfloat16': "
            "closer to 1, a moment's steps are less than bfloat16's last place, and "
            "rounding undoes them. moment_dtype='float32' is for any.",
        ),
        (
            ["optimizer.moment_dtype=bfloat16", "optimizer.beta1=0.993"],
            "beta1=0.993 must be at most 0.9921875 with moment_dtype='bfloat16': "
            "closer to 1, a moment's steps are less than bfloat16's last place, and "
            "rounding undoes them. moment_dtype='float32' is for any.",
        ),
        (["optimizer.beta1=1"], "beta1=1.0 must be at most 0.9999999."),
        (["optimizer.beta2=1"], "beta2=1.0 must be at most 0.9999999."),
        (["optimizer.beta1=-0.1"], "beta1=-0.1 must be at least 0.0."),
        (["optimizer.beta2=-0.1"], "beta2=-0.1 must be at least 0.0."),
        (["optimizer.epsilon=-1"], "epsilon=-1.0 must be at least 0.0."),
        (["optimizer.weight_decay=-1"], "weight_decay=-1.0 must be at least 0.0."),
        (["optimizer.clip_norm=0"], "clip_norm=0.0 must be above 0."),
        (["optimizer.clip_norm=nan"], "clip_norm=nan must be above 0."),
        (
            ["optimizer.schedule.name=linear"],
            "name='linear' is not one of 'constant', 'cosine', 'wsd', 'multi_step'.",
        ),
        (["optimizer.schedule.peak=inf"], "peak=inf must be finite."),
        (["optimizer.schedule.peak=-1"], "peak=-1.0 must be at least 0.0."),
        (["optimizer.schedule.warmup_steps=-1"], "warmup_steps=-1 must be at least 0."),
        (
            ["optimizer.schedule.end_fraction=-0.1"],
            "end_fraction=-0.1 must be at least 0.0.",
        ),
        (
            ["optimizer.schedule.decay_fraction=-0.1"],
            "decay_fraction=-0.1 must be at least 0.0.",
        ),
        (
            ["optimizer.schedule.tail_fraction=-0.1"],
            "tail_fraction=-0.1 must be at least 0.0.",
        ),
        (
            ["optimizer.schedule.tail_fraction=1.5"],
            "tail_fraction=1.5 must be at most 1.0.",
        ),
        (
            ["optimizer.schedule.end_fraction=1.5"],
            "end_fraction=1.5 must be at most 1.0.",
        ),
        (
            ["optimizer.schedule.decay_fraction=1.5"],
            "decay_fraction=1.5 must be at most 1.0.",
        ),
        (
            ["optimizer.schedule.boundaries=[0.5, 0.4, 0.9]"],
            "boundaries=(0.5, 0.4, 0.9) must rise between 0 and 1.",
        ),
        (
            ["optimizer.schedule.boundaries=[0.5, 0.9, 1.1]"],
            "boundaries=(0.5, 0.9, 1.1) must rise between 0 and 1.",
        ),
        (
            ["precision=int8"],
            "precision='int8' is not one of 'native', 'fp8', 'fp8_power_of_two', "
            "'fp8_tensor', 'fp8_square_gradients'.",
        ),
        (
            ["data.sequence_length=2048"],
            "data.sequence_length=2048 exceeds model.max_positions=1024.",
        ),
        (
            ["model.mtp_depth=3", "data.sequence_length=3"],
            "model.mtp_depth=3 leaves nothing to predict in data.sequence_length=3.",
        ),
    ],
)
def test_an_impossible_run_is_refused_by_name(assignments, said):
    with pytest.raises(ValueError) as error:
        records.override(plain_run(), assignments)
    assert str(error.value) == said


def test_a_sequence_may_fill_all_positions():
    run = records.override(plain_run(), ["data.sequence_length=1024"])
    assert run.data.sequence_length == run.model.max_positions


@pytest.mark.parametrize(
    ("name", "turn"),
    [("constant", 600), ("cosine", 600), ("wsd", 480), ("multi_step", 406)],
)
def test_a_warm_up_may_end_where_its_schedule_first_turns_and_no_later(name, turn):
    def run(warmup, *more):
        fields = {"name": name, "warmup_steps": warmup}
        given = [f"optimizer.schedule.{key}={value}" for key, value in fields.items()]
        return records.override(plain_run(), [*given, *more])

    assert run(turn).optimizer.schedule.warmup_steps == turn
    with pytest.raises(ValueError) as error:
        run(turn + 1)
    assert str(error.value) == (
        f"optimizer.schedule.warmup_steps={turn + 1} must be at most {turn}: there "
        f"'{name}' first turns, of the 600 steps that schedules are planned over "
        "(schedule.steps)."
    )
    assert run(turn + 1, "schedule.steps=700").horizon == 700


def test_schedules_are_planned_over_the_runs_steps_unless_they_are_told_otherwise():
    assert plain_run().horizon == 600
    longer = records.override(plain_run(), ["schedule.steps=900"])
    assert (longer.train.steps, longer.horizon) == (600, 900)
    held = ["schedule.steps=500", "schedule.beyond=hold"]
    assert records.override(plain_run(), held).horizon == 500


def ramp(**fields):
    return TrainConfig(steps=10, microbatch_size=8, **fields).ramp


def test_a_batch_grows_along_a_line_by_whole_increments():
    by_12 = ramp(batch_size=96, ramp_start=16, ramp_steps=100, ramp_increment=24)
    # From 2 microbatches to 12, by 3: line = 2 + step / 10.
    assert by_12 == {0: 2, 30: 5, 60: 8, 90: 11, 100: 12}
    # What several begin at is the largest's.
    assert ramp(batch_size=56, ramp_start=8, ramp_steps=2) == {0: 1, 1: 4, 2: 7}
    assert ramp(batch_size=16, ramp_start=16, ramp_steps=9) == {0: 2}
    assert ramp(batch_size=16) == {0: 2}


def test_v3s_ramp_has_at_most_eight_sizes_by_default():
    # 3072 to 15360 sequences over 469B tokens, in microbatches of 256.
    fields = {"batch_size": 15360, "microbatch_size": 256, "ramp_start": 3072}
    train = TrainConfig(steps=20_000, ramp_steps=12_426, **fields)
    assert list(train.ramp.values()) == [12, 19, 26, 33, 40, 47, 54, 60]
    assert len(train.ramp) == MOST_SIZES
    # The next smaller multiple would make one more.
    with pytest.raises(ValueError, match="makes 9 sizes .*ramp_increment=1792"):
        TrainConfig(steps=20_000, ramp_steps=12_426, ramp_increment=1536, **fields)


def test_clipping_can_be_turned_off():
    run = records.override(plain_run(), ["optimizer.clip_norm=inf"])
    assert run.optimizer.clip_norm == math.inf


def test_defaults_are_deepseek_v3s_tokens_as_fractions_of_the_run():
    # Section 4.2, in billions of tokens of 14,800.
    schedule, train = ScheduleConfig(), plain_run().train
    ends = (10_000 / 14_800, 14_300 / 14_800, 14_633 / 14_800)
    assert schedule.boundaries == pytest.approx(ends, abs=1e-3)
    assert schedule.peak * schedule.end_fraction == pytest.approx(2.2e-5)
    assert schedule.peak * schedule.tail_fraction == pytest.approx(7.3e-6)
    assert train.bias_rate.switch == pytest.approx(14_300 / 14_800, abs=1e-3)
    assert train.mtp_weight.switch == pytest.approx(10_000 / 14_800, abs=1e-3)
    assert (train.bias_rate.first, train.bias_rate.last) == (1e-3, 0.0)
    assert (train.mtp_weight.first, train.mtp_weight.last) == (0.3, 0.1)
