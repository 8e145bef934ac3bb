"""MATH-500: 500 problems of the MATH test set, judged by their final answers.

The problems are those of "Let's Verify Step by Step" (arXiv 2305.20050, appendix C),
of "Measuring Mathematical Problem Solving" (arXiv 2103.03874). As DeepSeek evaluates
(arXiv 2412.19437, section 5.3.1, and the directions for use of its models): zero-shot,
the problem and then `DIRECTIVE`, without a system prompt, greedily. Any file with the
same fields can be evaluated.

Of several samples of a problem, the accuracy is the mean, and pass@k the share of
problems of which one of the k is right.
"""

import collections
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jmoe.decode.requests import Sampling
from jmoe.evals.completions import Complete, Prompted
from jmoe.evals.judge import Judge
from jmoe.evals.records import read_records

DIRECTIVE = "Please reason step by step, and put your final answer within \\boxed{}."
FIELDS = ("problem", "answer", "subject", "level")
NAME = "unique_id"  # optional
SEEDS = 2**20  # between those of one sample and the next; more than there are problems
NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)


class Problem(NamedTuple):
    """name: `unique_id`, or the number of the record, counted from 1."""

    name: str
    problem: str
    answer: str
    subject: str
    level: str


class Asked(NamedTuple):
    """The sample of this number, counted from 0, of a problem."""

    problem: Problem
    sample: int
    prompted: Prompted

    @property
    def key(self) -> tuple[str, int]:
        """What tells it apart from others of an evaluation."""
        return self.problem.name, self.sample


class Sample(NamedTuple):
    """One answer to one problem, as it is written down."""

    name: str
    subject: str
    level: str
    sample: int
    prompt: str
    text: str
    finish_reason: str
    error: str
    gold: str
    answer: str | None
    is_correct: bool
    failure: str  # of judging


class Accuracy(NamedTuple):
    """Has the mean over problems; low and high: its 95% confidence interval."""

    accuracy: float
    low: float
    high: float
    problems: int


class Score(NamedTuple):
    """`pass_at_k`: equal to the accuracy where each problem has one sample."""

    total: Accuracy
    by_level: dict[str, Accuracy]
    by_subject: dict[str, Accuracy]
    pass_at_k: float
    samples: int
    unfinished: int  # that ended by their length
    without_answer: int
    not_judged: int  # among the wrong ones: too long or too hard to compare
    errors: int
    error: str  # the most frequent one


def read_problems(path: pathlib.Path) -> list[Problem]:
    """Reads problems from a .jsonl file; raises as `read_records` does."""
    records = read_records(path, FIELDS, text=("problem", "answer"))
    problems = [
        Problem(
            str(record.get(NAME, number)),
            record["problem"],
            record["answer"],
            str(record["subject"]),
            str(record["level"]),
        )
        for number, record in enumerate(records, 1)
    ]
    names = collections.Counter(problem.name for problem in problems)
    for name, count in names.items():
        if count > 1:
            raise ValueError(f"{path}: {count} problems have {NAME}={name!r}.")
    return problems


def message(problem: str) -> str:
    """Returns what a chat model is asked."""
    return f"{problem}\n{DIRECTIVE}"


def opening(problem: str) -> str:
    """Returns the text that a model without a chat template goes on from."""
    return f"{message(problem)}\n"


def plan(
    problems: Sequence[Problem],
    sampling: Sampling,
    num_samples: int = 1,
    prompt: Callable[[str], str] = opening,
) -> list[Asked]:
    """Returns what to ask: so many samples of each problem, each with its own seed.

    Args:
      prompt: `opening`, or `message` for a chat model.

    Raises:
      ValueError: no samples, or several, which without a temperature are all the same.
    """
    if num_samples < 1:
        raise ValueError(f"samples={num_samples} must be at least 1.")
    if num_samples > 1 and sampling.temperature == 0:
        raise ValueError(
            f"samples={num_samples} with temperature=0 are all the same; let there be "
            "one, or a temperature above 0."
        )
    return [
        Asked(
            problem,
            i,
            Prompted(prompt(problem.problem), sampling.further(place + i * SEEDS)),
        )
        for i in range(num_samples)
        for place, problem in enumerate(problems)
    ]


def split(
    asked: Sequence[Asked], known: Iterable[Sample]
) -> tuple[list[Sample], list[Asked]]:
    """Returns the samples among `known` that are asked for, and what is left to ask."""
    found = {(sample.name, sample.sample): sample for sample in known}
    left = [each for each in asked if each.key not in found]
    return [found[each.key] for each in asked if each.key in found], left


def evaluate(
    asked: Sequence[Asked], complete: Complete, judge: Judge
) -> Iterator[Sample]:
    """Yields judged samples, in the order in which they are finished."""
    for reply in complete([each.prompted for each in asked]):
        problem, number, prompted = asked[reply.number]
        verdict = judge(problem.answer, reply.text)
        yield Sample(
            name=problem.name,
            subject=problem.subject,
            level=problem.level,
            sample=number,
            prompt=str(prompted.text),
            text=reply.text,
            finish_reason=reply.finish_reason,
            error=reply.error,
            gold=problem.answer,
            answer=verdict.answer,
            is_correct=verdict.is_correct,
            failure=verdict.failure,
        )


def score(samples: Iterable[Sample]) -> Score:
    """Sums up samples, as many of each problem.

    Raises:
      ValueError: there is no sample.
    """
    samples = list(samples)
    if not samples:
        raise ValueError("There are no samples to score.")
    by_problem: dict[str, list[Sample]] = collections.defaultdict(list)
    for sample in samples:
        by_problem[sample.name].append(sample)
    groups = list(by_problem.values())
    return Score(
        total=_accuracy(groups),
        by_level=_by(lambda group: group[0].level, groups),
        by_subject=_by(lambda group: group[0].subject, groups),
        pass_at_k=sum(any(s.is_correct for s in g) for g in groups) / len(groups),
        samples=len(samples),
        unfinished=sum(sample.finish_reason == "length" for sample in samples),
        without_answer=sum(sample.answer is None for sample in samples),
        not_judged=sum(bool(s.failure) and s.answer is not None for s in samples),
        errors=sum(bool(sample.error) for sample in samples),
        error=statistics.mode([s.error for s in samples if s.error] or [""]),
    )


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """Returns the 95% confidence interval of a share of so many trials.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference"
    (1927). Unlike the normal one it is right near 0 and 1, and for few trials.
    """
    z2 = NORMAL_95**2 / count
    middle = (accuracy + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / 4)) / (1 + z2)
    # Roundings may leave an end within the share that it bounds.
    low, high = min(accuracy, middle - half), max(accuracy, middle + half)
    return max(0.0, low), min(1.0, high)


def _by(
    key: Callable[[list[Sample]], str], groups: Sequence[list[Sample]]
) -> dict[str, Accuracy]:
    names = sorted({key(group) for group in groups})
    return {name: _accuracy([g for g in groups if key(g) == name]) for name in names}


def _accuracy(groups: Sequence[list[Sample]]) -> Accuracy:
    """Returns the mean of problems, whose samples count as much as one together.

    Samples of a problem resemble each other; so the interval is that of one a problem,
    which is too wide rather than too narrow.
    """
    shares = [sum(s.is_correct for s in group) / len(group) for group in groups]
    accuracy = sum(shares) / len(shares)
    return Accuracy(accuracy, *wilson(accuracy, len(shares)), len(shares))
