"""Whether an answer in mathematics is right: extracted here, judged by math-verify.

An answer is what stands in the last \\boxed{} of a text. It is right if math-verify
finds it equal to the gold answer: as text, as a number or as an expression.

A model may write anything, and sympy may work on it for ever, in code that no signal
interrupts. So the library runs in a process of its own (`judge_worker`), which is ended
and replaced when it is late or dies. That works in any thread, which the library's own
limits, made of signals, don't.
"""

import contextlib
import importlib.util
import json
import pathlib
import select
import subprocess
import sys
import threading
from typing import Any, NamedTuple, Self

WORKER = pathlib.Path(__file__).with_name("judge_worker.py")
START_SECONDS = 120.0  # to import sympy, on a machine with other work
MAX_CHARACTERS = 2000  # of an answer; the longest of MATH-500 has under 60
BOX = "\\boxed{"


class Verdict(NamedTuple):
    """answer: what was in the box, or None; failure: why it couldn't be judged."""

    answer: str | None
    is_correct: bool
    failure: str = ""


def boxed(text: str) -> str | None:
    """Returns what is in the text's last \\boxed{}, or None without a closed one."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    start += len(BOX)
    depth = 1
    is_escaped = False
    for end in range(start, len(text)):
        character = text[end]
        if not is_escaped:
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:end].strip()
        is_escaped = character == "\\" and not is_escaped
    return None


class Judge:
    """Compares answers, one at a time; threads wait for each other. Close it.

    Args:
      seconds: what one comparison may take; one that takes longer is a wrong answer.

    Raises:
      ValueError: math-verify isn't installed.
    """

    def __init__(self, seconds: float = 10.0):
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "Answers are judged by math-verify, which isn't installed: "
                "pip install 'jmoe[eval]'."
            )
        self._seconds = seconds
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def __call__(self, gold: str, text: str) -> Verdict:
        """Judges the answer that a text gives."""
        answer = boxed(text)
        if answer is None:
            return Verdict(None, False, "no answer in a box")
        if len(answer) > MAX_CHARACTERS:
            return Verdict(answer[:MAX_CHARACTERS], False, "too long an answer")
        with self._lock:
            found = self._ask([gold, answer])
        return Verdict(answer, found.get("is_equal", False), found.get("failure", ""))

    def _ask(self, question: Any) -> dict[str, Any]:
        worker = self._worker
        if worker is None or worker.poll() is not None:
            self._end()
            worker = self._start()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(question) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:  # it is dying, which its missing answer will show
            pass
        return self._answer(worker, self._seconds)

    def _start(self) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        if not self._answer(worker, START_SECONDS).get("is_ready"):
            raise ValueError(
                "math-verify can't be imported, as "
                f"`{sys.executable} -c 'import math_verify'` will show."
            )
        return worker

    def _answer(self, worker: subprocess.Popen[str], seconds: float) -> dict[str, Any]:
        """Returns the worker's next line; ends the worker if there is none in time."""
        assert worker.stdout is not None
        self._worker = worker
        ready, _, _ = select.select([worker.stdout], [], [], seconds)
        line = worker.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self._end()
        return {"failure": "judging died" if ready else "judging took too long"}

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.kill()
            with contextlib.suppress(BrokenPipeError):  # of what it didn't read
                worker.communicate()
