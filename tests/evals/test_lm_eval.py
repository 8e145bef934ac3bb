"""EleutherAI's harness on a model here, with tasks made of a local file."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness isn't installed")

from lm_eval.api.instance import Instance  # noqa: E402  # pyright: ignore

from jmoe.decode.requests import Sampling  # noqa: E402
from jmoe.evals import lm_eval  # noqa: E402
from jmoe.evals.completions import LocalModel, Prompted  # noqa: E402
from jmoe.evals.likelihood import likelihoods  # noqa: E402
from jmoe.evals.lm_eval import HarnessModel  # noqa: E402

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{problem}}}}"
"""
CHOICE = """
doc_to_choice: ["1", "2"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
UNTIL = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{problem}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
DOCS = [{"problem": text, "answer": "4"} for text in ("What is half?", "ab", "2 or 3")]


@pytest.fixture(scope="module")
def model(cfg, variables, tokenizer):
    return LocalModel(cfg, variables, tokenizer)


@pytest.fixture
def make_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))

    def make(name, kind, more):
        path = tmp_path / f"{name}.yaml"
        text = TASK.format(name=name, file=file, kind=kind)
        if "doc_to_text" in more:
            text = text.replace('doc_to_text: "{{problem}}"\n', "")
        path.write_text(text + more)
        return str(path)

    return make


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i)
        for i, a in enumerate(arguments)
    ]


def test_a_continuation_is_scored_after_its_context(model):
    pairs = [("What is", " half"), ("", "ab"), ("ab ", "What")]
    found = HarnessModel(model).loglikelihood(requests("loglikelihood", *pairs))
    eos, encode = model.tokenizer.eos_id, model.tokenizer.encode
    for (context, following), (log_prob, _) in zip(pairs, found, strict=True):
        whole = [eos, *encode(context + following)]
        after = len(encode(context.rstrip())) + 1
        pair = whole[:after], whole[after:]
        want = dict(likelihoods(model.cfg, model.variables, [pair]))[0].log_prob
        assert log_prob == pytest.approx(want, abs=1e-4)


def test_a_long_text_is_predicted_token_by_token_exactly_once(model):
    text = "What is half of a half? " * 15
    ids = model.tokenizer.encode(text)
    size = model.cfg.max_positions
    assert 2 * size < len(ids)
    (got,) = HarnessModel(model).loglikelihood_rolling(requests("rolling", (text,)))
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    pairs = [([model.tokenizer.eos_id], parts[0])]
    # The last window has as much context as there are positions for.
    for i, part in enumerate(parts[1:], 1):
        end = i * size + len(part)
        context = ids[max(0, end - size - 1) : i * size]
        pairs.append((context, part))
    found = dict(likelihoods(model.cfg, model.variables, pairs))
    assert got == pytest.approx(sum(x.log_prob for x in found.values()), rel=1e-5)


def test_texts_are_generated_as_the_model_completes_them(model):
    told = {"until": ["e"], "max_gen_toks": 6, "do_sample": False}
    contexts = ["What is", "ab"]
    asked = requests("generate_until", *((text, told) for text in contexts))
    sampling = Sampling(max_new_tokens=6, stop_texts=("e",))
    want = sorted(model.complete([Prompted(text, sampling) for text in contexts]))
    assert HarnessModel(model).generate_until(asked) == [r.text for r in want]


def test_a_context_that_is_too_long_loses_its_beginning(model):
    told = {"until": [], "max_gen_toks": 6}
    asked = requests("generate_until", ("half " * 200 + "ab", told))
    (got,) = HarnessModel(model).generate_until(asked)
    assert isinstance(got, str)


def test_a_setting_that_jmoe_lacks_is_refused_by_name(model):
    asked = requests("generate_until", ("ab", {"until": [], "num_beams": 4}))
    with pytest.raises(ValueError, match="generation_kwargs have num_beams; jmoe take"):
        HarnessModel(model).generate_until(asked)


@pytest.mark.filterwarnings("ignore")  # those of the libraries that read data
@pytest.mark.parametrize(
    ("kind", "more", "metric"),
    [
        ("multiple_choice", CHOICE, "acc,none"),
        ("generate_until", UNTIL, "exact_match,none"),
        ("loglikelihood_rolling", ROLLING, "word_perplexity,none"),
    ],
    ids=["choice", "generation", "rolling"],
)
def test_a_task_of_a_local_file_runs_from_end_to_end(
    model, make_task, kind, more, metric
):
    told = []
    path = make_task(f"local_{kind}", kind, more)
    found = lm_eval.evaluate(model, path, progress=lambda *x: told.append(x))
    value = found["results"][f"local_{kind}"][metric]
    assert np.isfinite(value) and told[-1][0] == told[-1][2] > 0
    if kind == "multiple_choice":
        assert value in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)


def test_a_task_that_there_is_not_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.yaml': no such file"):
        lm_eval.evaluate(model, str(tmp_path / "nothing.yaml"))
    with pytest.raises(ValueError, match="task='nothing' is none of jmoe's, nor of"):
        lm_eval.evaluate(model, "nothing")
