"""Problems of our own, a judge for all files, and a model that answers as told."""

import json
import pathlib
from collections.abc import Callable, Iterator

import pytest

from jmoe.config import ModelConfig
from jmoe.data.tokenizer import Tokenizer, train_bpe
from jmoe.evals.completions import Reply
from jmoe.evals.judge import Judge
from tests import parity, smallest_run

PROBLEMS = [
    {
        "problem": "What is half of a half?",
        "solution": "It is $\\frac12 \\cdot \\frac12 = \\boxed{\\frac{1}{4}}$.",
        "answer": "\\frac{1}{4}",
        "subject": "Prealgebra",
        "level": 1,
    },
    {
        "problem": "Which numbers have the square $9$?",
        "solution": "The answer is not $\\boxed{3}$ alone, but $\\boxed{-3, 3}$.",
        "answer": "-3,3",
        "subject": "Algebra",
        "level": 2,
    },
    {
        "problem": "Factor $x^2 - 1$.",
        "solution": "Thus $\\boxed{(x-1)(x+1)}$.",
        "answer": "(x-1)(x+1)",
        "subject": "Algebra",
        "level": 2,
    },
    {
        "problem": "Which of the days begins the week in Rome?",
        "solution": "It is $\\boxed{\\text{Monday}}$.",
        "answer": "\\text{Monday}",
        "subject": "Prealgebra",
        "level": 1,
    },
    {
        "problem": "Where is $\\log x$ defined?",
        "solution": "On $\\boxed{(0,\\infty)}$.",
        "answer": "(0,\\infty)",
        "subject": "Algebra",
        "level": 3,
    },
]


@pytest.fixture(scope="session")
def judge() -> Iterator[Judge]:
    with Judge(seconds=60) as judge:
        yield judge


@pytest.fixture
def problems_file(tmp_path) -> pathlib.Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROBLEMS))
    return path


@pytest.fixture(scope="session")
def solving() -> Callable:
    """Makes a `Complete` that gives the solutions, but of some problems another."""

    def make(wrong: dict[str, str] | None = None) -> Callable:
        known = {record["problem"]: record["solution"] for record in PROBLEMS}

        def complete(prompts) -> Iterator[Reply]:
            for number in reversed(range(len(prompts))):
                problem = prompts[number].text.splitlines()[0]
                text = (wrong or {}).get(problem, known[problem])
                yield Reply(number, text, "stop")

        return complete

    return make


@pytest.fixture(scope="session")
def cfg() -> ModelConfig:
    return smallest_run.get_config().model


@pytest.fixture(scope="session")
def variables(cfg):
    return parity.random_variables(cfg)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [f"{p['problem']}\n{p['solution']}" for p in PROBLEMS]
    return Tokenizer(train_bpe(texts, 300), eos_id=0)
