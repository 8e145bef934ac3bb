"""A model of jmoe for EleutherAI's lm-evaluation-harness, so that its tasks run on it.

    model = HarnessModel(LocalModel(cfg, variables, tokenizer))
    lm_eval.simple_evaluate(model=model, tasks=["arc_easy"])

Texts begin as documents did in training, with what opens one (`Tokenizer.opening`).
There is no chat template. What is too long for the model loses its beginning.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval import evaluator, tasks, utils
from lm_eval.api.model import TemplateLM

from jmoe.decode.requests import Sampling
from jmoe.evals.completions import LocalModel, Prompted
from jmoe.evals.likelihood import Pair, likelihoods

MAX_NEW_TOKENS = 256  # where a task doesn't say
KNOWN = {"until", "max_gen_toks", "temperature", "top_p", "do_sample"}

# Is told how many requests are done, a word, and how many there are.
Progress = Callable[[int, str, int], None]


def _silent(*_: Any) -> None:
    pass


class HarnessModel(TemplateLM):
    """Answers the harness's requests by a model in this process."""

    def __init__(self, model: LocalModel, progress: Progress = _silent):
        super().__init__()
        self._model, self._progress = model, progress

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return (*self._model.tokenizer.opening, self.eot_token_id)[0]

    @property
    def max_length(self) -> int:
        return self._model.cfg.max_positions

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns token ids, after those that open a text unless told otherwise."""
        ids = self._model.tokenizer.encode(string)
        return ids if add_special_tokens is False else [*self._opening, *ids]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns each text's log-probability; one that is too long comes in parts."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(utils.make_disjoint_window, windows):
                pairs.append(window)
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._likelihoods(pairs), strict=True):
            totals[owner] += log_prob
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Returns continuations, each up to what its task ends it with."""
        prompts = [self._prompted(*request.args) for request in requests]
        texts = [""] * len(prompts)
        for done, reply in enumerate(self._model.complete(prompts), 1):
            if reply.error:
                raise ValueError(f"Request {reply.number}: {reply.error}")
            texts[reply.number] = reply.text
            self._progress(done, "generated", len(prompts))
        return texts

    @property
    def _opening(self) -> Sequence[int]:
        return self._model.tokenizer.opening

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        return self._likelihoods([tuple(ids) for _, *ids in requests])

    def _likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Returns log-probability and whether it is the greedy text, of each pair."""
        found: list[Any] = [None] * len(pairs)
        scored = likelihoods(self._model.cfg, self._model.variables, pairs)
        for done, (number, likelihood) in enumerate(scored, 1):
            found[number] = tuple(likelihood)
            self._progress(done, "scored", len(pairs))
        return found

    def _prompted(self, context: str, told: dict[str, Any]) -> Prompted:
        unknown = {name for name in told if told[name] is not None} - KNOWN
        if unknown:
            raise ValueError(
                f"The task's generation_kwargs have {', '.join(sorted(unknown))}; jmoe "
                f"takes {', '.join(sorted(KNOWN))}."
            )
        until = told.get("until") or ()
        is_drawn = told.get("do_sample", told.get("temperature", 0) > 0)
        sampling = Sampling(
            temperature=told.get("temperature", 1.0) if is_drawn else 0.0,
            top_p=told.get("top_p", 1.0),
            max_new_tokens=told.get("max_gen_toks", MAX_NEW_TOKENS),
            stop_texts=(until,) if isinstance(until, str) else tuple(until),
        )
        room = max(1, self.max_length - sampling.max_new_tokens)
        ids = self.tok_encode(context) or [self.eot_token_id]
        return Prompted(ids[-room:], sampling)


def evaluate(
    model: LocalModel,
    task: str,
    *,
    limit: int | None = None,
    progress: Progress = _silent,
) -> dict[str, Any]:
    """Returns what the harness found.

    Args:
      task: the name of one of its tasks, or the path of a YAML file that describes one.
      limit: only so many documents of each task.

    Raises:
      FileNotFoundError: no such file.
      ValueError: there is no such task.
    """
    is_file = pathlib.Path(task).suffix in (".yaml", ".yml")
    if is_file and not pathlib.Path(task).is_file():
        raise FileNotFoundError(f"task={task!r}: no such file.")
    manager = tasks.TaskManager(include_defaults=not is_file)
    if not is_file and task not in manager.all_tasks:
        raise ValueError(
            f"task={task!r} is none of jmoe's, nor of the harness's "
            f"{len(manager.all_tasks):,}, which `lm_eval ls tasks` lists."
        )
    found = evaluator.simple_evaluate(
        model=HarnessModel(model, progress),
        tasks=[task],
        limit=limit,
        task_manager=manager,
    )
    assert found is not None  # as this is the only process
    return found
