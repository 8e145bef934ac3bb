"""A run's directory: what may change when a run goes on, and what is refused."""

import json
import threading

import pytest

from jmoe.checkpoint import workdir
from jmoe.checkpoint.workdir import open_run, read_run
from jmoe.config import override
from jmoe.config.presets import small_run
from jmoe.parallel import process_group
from tests.plain_run import plain_run
from tests.several_processes import together

TINY = plain_run()


@pytest.fixture
def run_dir(tmp_path):
    assert open_run(tmp_path / "runs" / "tiny", TINY) is False
    return tmp_path / "runs" / "tiny"


def test_a_new_workdir_gets_the_record_of_the_run_and_nothing_else(run_dir):
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]
    assert read_run(run_dir) == TINY


def test_an_empty_workdir_is_as_good_as_a_new_one(tmp_path):
    assert open_run(tmp_path, TINY) is False
    assert read_run(tmp_path) == TINY


def test_the_same_run_goes_on_and_its_record_is_left_alone(run_dir):
    (run_dir / "checkpoints").mkdir()
    before = (run_dir / "config.json").stat().st_mtime_ns
    assert open_run(run_dir, TINY) is True
    assert (run_dir / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=900",
        "train.log_every=1",
        "train.eval_every=7",
        "train.checkpoint_every=3",
        "train.keep_checkpoints=9",
        "optimizer.schedule.peak=0.5",
        "optimizer.weight_decay=0.0",
        "model.family='kimi_k2'",
        "model.remat='block'",
        "model.moe.exchange.backend='balanced'",
        "model.attention.block_size=64",
        "data.cache_dir='/elsewhere'",
        "data.on_corrupt='skip'",
        "data.sources.1.path='/elsewhere/prose.txt'",  # the loader compares contents
    ],
)
def test_harmless_fields_may_change_and_the_record_follows(run_dir, change):
    changed = override(TINY, [change])
    assert open_run(run_dir, changed) is True
    assert read_run(run_dir) == changed


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.hidden_dim=64", "model.hidden_dim: 128 there, 64 given"),
        ("model.moe.router.top_k=2", "model.moe.router.top_k: 4 there, 2 given"),
        ("data.sequence_length=128", "data.sequence_length: 256 there, 128 given"),
        ("data.sources.1.weight=9", "data.sources.1.weight: 0.3 there, 9.0 given"),
        ("data.sources.0.text_field='a'", "data.sources.0.text_field: 'text' there"),
        ("data.sources=[{'path': 'builtin'}]", "data.sources: [{"),
        ("data.tokenizer='/elsewhere.json'", "data.tokenizer: 'builtin' there"),
        ("optimizer.name='muon'", "optimizer.name: 'adamw' there, 'muon' given"),
        ("optimizer.moment_dtype='bfloat16'", "optimizer.moment_dtype: 'float32'"),
        ("train.microbatch_size=4", "train.microbatch_size: 8 there, 4 given"),
        ("train.seed=1", "train.seed: 0 there, 1 given"),
    ],
)
def test_fields_that_make_it_another_run_are_refused_by_name(run_dir, change, message):
    before = (run_dir / "config.json").read_bytes()
    with pytest.raises(ValueError) as caught:
        open_run(run_dir, override(TINY, [change, "train.steps=900"]))
    assert message in str(caught.value) and "train.steps" not in str(caught.value)
    assert (run_dir / "config.json").read_bytes() == before


def test_the_tokenizer_may_lie_elsewhere_if_it_is_the_same(run_dir, tmp_path):
    (run_dir / "tokenizer.json").write_text("same")
    (tmp_path / "copy.json").write_text("same")
    (tmp_path / "other.json").write_text("else")
    given = [
        override(TINY, [f"data.tokenizer={tmp_path / name}"])
        for name in ("copy.json", "other.json")
    ]
    with pytest.raises(ValueError, match="data.tokenizer: 'builtin' there"):
        open_run(run_dir, given[1])
    assert open_run(run_dir, given[0]) is True
    assert read_run(run_dir) == given[0]


def test_every_field_of_another_model_is_listed(run_dir):
    with pytest.raises(ValueError) as caught:
        open_run(run_dir, small_run())
    for name in (
        "model.vocab_size",
        "model.moe.expert_mlp_dim",
        "data.sequence_length",
    ):
        assert f"\n  {name}: " in str(caught.value)


def test_a_record_that_appears_is_one_difference(run_dir):
    with_yarn = json.loads((run_dir / "config.json").read_text())
    with_yarn["model"]["attention"]["yarn"] = {"factor": 4.0, "original_positions": 64}
    (run_dir / "config.json").write_text(json.dumps(with_yarn))
    with pytest.raises(ValueError, match=r"model.attention.yarn: \{.*\} there, None"):
        open_run(run_dir, TINY)


def test_fields_added_since_the_run_began_take_their_defaults(run_dir):
    older = json.loads((run_dir / "config.json").read_text())
    del older["model"]["norm_eps"], older["train"]["log_every"]
    (run_dir / "config.json").write_text(json.dumps(older))
    assert open_run(run_dir, TINY) is True


def test_a_run_from_before_there_were_families_is_of_the_first(run_dir):
    older = json.loads((run_dir / "config.json").read_text())
    del older["model"]["family"]
    (run_dir / "config.json").write_text(json.dumps(older))
    assert read_run(run_dir).model.family == "deepseek_v3"


def test_a_family_that_is_not_known_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="family='llama' is not a family.*deepseek_v3"):
        open_run(tmp_path / "run", override(TINY, ["model.family=llama"]))
    assert not (tmp_path / "run").exists()


def test_a_directory_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="no config.json but holds 'thesis.tex'"):
        open_run(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(ValueError, match="notes' must be a directory"):
        open_run(tmp_path / "notes", TINY)
    assert (tmp_path / "notes").read_text() == "precious"


@pytest.mark.parametrize("text", ["", "{", '{"name": "tiny", "modle": {}}'])
def test_an_unreadable_record_is_an_error_that_names_the_file(run_dir, text):
    (run_dir / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not the record of a run"):
        open_run(run_dir, TINY)
    assert (run_dir / "config.json").read_text() == text


def test_a_run_killed_while_its_record_was_written_can_begin_again(tmp_path):
    (tmp_path / workdir._UNFINISHED).write_text('{"name": "ti')
    assert open_run(tmp_path, TINY) is False
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_workdir_without_a_record_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_run(tmp_path)


def test_a_workdir_that_is_not_one_for_all_processes_is_refused_on_all(tmp_path):
    own = [tmp_path / name for name in ("a", "b")]
    for index, directory in enumerate(own):
        directory.mkdir()
        (directory / "run.json").write_text(f"written by {index}")

    def check(directory):
        workdir.check_shared(directory / "run.json", timeout_s=0.3)

    errors = together(check, *own)
    complaint = "must be one directory for all processes"
    assert [type(error) for error in errors] == [process_group.RemoteError, ValueError]
    assert all(complaint in str(error) for error in errors)
    assert together(check, own[0], own[0]) == [None, None]


def test_what_process_0_wrote_may_take_a_while_to_be_seen(tmp_path):
    def check(late):
        path = tmp_path / ("late.json" if late else "run.json")
        if late:
            threading.Timer(0.3, path.write_text, ["{}"]).start()
        else:
            path.write_text("{}")
        workdir.check_shared(path, timeout_s=20)

    assert together(check, False, True) == [None, None]
