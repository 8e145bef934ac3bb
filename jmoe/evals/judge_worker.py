"""The process that judges answers: a line of JSON in, a line of JSON out.

`jmoe.evals.judge` runs this file. It imports nothing of jmoe, so that it starts in
about a second, and limits its memory, as numbers in an answer may be of any size.
"""

import contextlib
import json
import logging
import resource
import signal
import sys

MEMORY_BYTES = 4 * 2**30
ALONE_SECONDS = 600  # over one answer; then nobody is there who would have ended it


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    logging.disable(logging.WARNING)  # that there is no time limit: `judge` has one
    import math_verify

    # LaTeX alone is parsed; plain expressions sympy would evaluate as Python's code.
    boxed = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]

    def parse(answer: str) -> list:
        text = f"$\\boxed{{{answer}}}$"
        return math_verify.parse(text, extraction_config=boxed, parsing_timeout=0)

    def is_equal(gold: str, answer: str) -> bool:
        return math_verify.verify(parse(gold), parse(answer), timeout_seconds=0)

    answers = sys.stdout
    sys.stdout = sys.stderr  # where what a library prints is no answer
    print(json.dumps({"is_ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        signal.alarm(ALONE_SECONDS)  # which ends the process, even inside of C
        try:
            found = {"is_equal": bool(is_equal(*json.loads(line)))}
        except Exception as error:  # whatever an answer makes sympy do
            found = {"failure": type(error).__name__}
        signal.alarm(0)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
