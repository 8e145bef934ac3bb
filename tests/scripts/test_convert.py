"""scripts/export_hf.py and scripts/import_hf.py: a run goes out, comes in, goes on."""

import json
import pathlib
import shutil

import pytest

from jmoe.export import safetensors

GREEDY = ("--prompt=The square of ", "--temperature=0", "--max_new_tokens=20")

pytestmark = pytest.mark.usefixtures("sharing_programs")


@pytest.fixture(scope="module")
def exported(script, trained, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("exported") / "hf"
    outcome = script("export_hf", f"--workdir={trained}", f"--out={out}")
    assert outcome.code == 0 and outcome.err == ""
    assert f"to {out}: 0.00 GB in 0:00:00" in outcome.out
    return out


@pytest.fixture(scope="module")
def imported(script, exported, smallest_arguments) -> pathlib.Path:
    """A run of the exported model, to be trained on the same text."""
    workdir = exported.with_name("imported")
    data = [argument for argument in smallest_arguments if "--set=" in argument]
    outcome = script(
        "import_hf",
        f"--model={exported}",
        f"--workdir={workdir}",
        *data,
        "--set=data.sequence_length=32",
        "--set=data.validation_fraction=0.2",
        "--set=train.batch_size=8",
        "--set=train.microbatch_size=4",
        "--set=train.eval_batches=2",
        "--set=train.steps=2",
    )
    assert outcome.code == 0 and outcome.err == ""
    return workdir


def test_the_imported_model_writes_the_same_text(script, trained, imported):
    texts = [
        script("generate", f"--workdir={workdir}", *GREEDY).out
        for workdir in (trained, imported)
    ]
    assert texts[0] == texts[1] != ""


def test_a_directory_writes_the_text_of_the_run_that_it_was_exported_from(
    script, trained, exported, tmp_path
):
    text = script("generate", f"--workdir={trained}", *GREEDY).out
    assert script("generate", f"--model={exported}", *GREEDY).out == text != ""
    narrow = tmp_path / "bfloat16"
    to = (f"--out={narrow}", "--dtype=bfloat16")
    assert script("export_hf", f"--workdir={trained}", *to).code == 0
    outcome = script("generate", f"--model={narrow}", "--weights=fp8", *GREEDY)
    assert outcome.code == 0 and "is" in outcome.out


@pytest.mark.parametrize(
    "missing", ["config.json", "tokenizer.json", "model.safetensors"]
)
def test_what_a_directory_lacks_to_generate_text_is_named(
    script, exported, tmp_path, missing
):
    partial = shutil.copytree(exported, tmp_path / "partial")
    (partial / missing).unlink()
    outcome = script("generate", f"--model={partial}", *GREEDY)
    assert missing.removeprefix("model") in outcome.mistake()


def test_training_goes_on_from_imported_weights(script, trained, imported):
    def losses(workdir):
        rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        return [row["val_loss"] for row in rows if "val_loss" in row]

    record = f"--experiment={imported / 'config.json'}"
    outcome = script("train", record, f"--workdir={imported}")
    assert outcome.code == 0, outcome.err
    assert losses(imported)[0] == pytest.approx(losses(trained)[-1], abs=0.05)
    more = ("--set=train.steps=3", "--set=schedule.beyond=hold")
    outcome = script("train", record, f"--workdir={imported}", *more)
    assert "Goes on from the checkpoint of step 2" in outcome.out


def test_another_model_than_the_files_have_is_refused(script, exported, tmp_path):
    options = (f"--model={exported}", f"--workdir={tmp_path / 'x'}")
    outcome = script("import_hf", *options, "--set=model.hidden_dim=48")
    assert "model.hidden_dim=48 must stay 32" in outcome.mistake()
    assert not list(tmp_path.iterdir())


def test_a_runs_directory_may_end_with_a_slash(script, trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    outcome = script("export_hf", f"--workdir={workdir}/")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run_hf"}


def test_types_formats_and_sizes_of_files_can_be_chosen(script, trained, tmp_path):
    options = ("--dtype=fp8", "--shard_gb=0.00005")
    outcome = script(
        "export_hf", f"--workdir={trained}", f"--out={tmp_path / 'hf'}", *options
    )
    assert outcome.code == 0, outcome.err
    found = safetensors.read_headers(tmp_path / "hf")
    assert {x.code for x in found.values()} == {"F8_E4M3", "F32", "BF16"}
    assert len({x.file for x in found.values()}) > 1
    torch = pytest.importorskip("torch")
    out = tmp_path / "weights.pt"
    outcome = script("export_hf", f"--workdir={trained}", f"--out={out}", "--format=pt")
    assert outcome.code == 0, outcome.err
    assert torch.load(out).keys() == {n for n in found if not n.endswith("_inv")}


def test_the_best_checkpoint_by_validation_can_be_exported(script, trained, tmp_path):
    for step in (20, 40, "best"):
        out = tmp_path / str(step)
        outcome = script(
            "export_hf", f"--workdir={trained}", f"--out={out}", f"--step={step}"
        )
        assert outcome.code == 0, outcome.err
    weights = {p.parent.name: p.read_bytes() for p in tmp_path.glob("*/*.safetensors")}
    assert weights["20"] != weights["40"] == weights["best"]
    assert "| training steps | 40 |" in (tmp_path / "best" / "README.md").read_text()


def test_a_dry_run_writes_nothing(script, tmp_path):
    outcome = script("export_hf", "--dry_run", "--model=tiny", "--dtype=bfloat16")
    assert outcome.code == 0, outcome.err
    assert "tensors of 4.8M parameters, 0.01 GB in 1 files" in outcome.out


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("export_hf", ["--workdir={0}/no"], "no' holds no run: it has no config.json"),
        ("export_hf", ["--workdir={0}", "--out={0}"], "exists already"),
        ("export_hf", ["--workdir={0}", "--step=7"], "No checkpoint of step 7"),
        ("export_hf", ["--workdir={0}", "--step=-1"], "step='-1' must be a step's"),
        ("export_hf", ["--workdir={0}", "--shard_gb=0"], "shard_gb=0.0 must be above"),
        (
            "export_hf",
            ["--workdir={0}", "--shard_gb=inf"],
            "shard_gb=inf must be",
        ),
        ("export_hf", ["--workdir={0}", "--out=gs://x"], "must be a path of this"),
        ("import_hf", ["--model=gs://x", "--workdir={0}/x"], "must be a path of this"),
        ("export_hf", ["--dry_run", "--model=v4"], "Unknown model preset 'v4'"),
        ("import_hf", ["--model={0}/no", "--workdir={0}/x"], "no' is not a directory"),
        (
            "import_hf",
            ["--model={0}", "--workdir={0}/x"],
            "The config lacks model_type",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(
    script, trained, name, arguments, complaint
):
    outcome = script(name, *(text.format(trained) for text in arguments))
    assert complaint in outcome.mistake()
