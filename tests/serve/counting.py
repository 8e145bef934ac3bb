"""An engine that is told what to do, and computes nothing."""

import threading
import time

from jmoe.decode.engine import Update
from jmoe.decode.limits import Limits
from jmoe.decode.requests import Completion

SLOTS, QUEUE = 2, 5  # of requests


class Counting:
    """Gives requests the tokens 0, 1, 2, ... one in each step, as an engine would.

    Steps wait for `may_step`, and raise `failure` if there is one.
    """

    slots, limits = SLOTS, Limits(queue=QUEUE)
    most_waiting = QUEUE

    def __init__(self, pause: float = 0.0):
        self.pause = pause  # seconds of a step
        self.asked: dict[int, tuple[Completion, int]] = {}
        self.failure: Exception | None = None
        self.may_step = threading.Event()
        self.may_step.set()
        self.steps = self.submitted = self.looks = 0

    def check(self, prompt, sampling):
        if not prompt:
            raise ValueError("A prompt must not be empty.")

    def submit(self, prompt, sampling):
        self.submitted += 1
        completion = Completion(self.submitted)
        self.asked[completion.number] = completion, sampling.max_new_tokens
        return completion.number

    def cancel(self, number):
        self.asked[number][0].finish_reason = "cancelled"

    @property
    def is_idle(self):
        self.looks += 1
        return not self.asked

    def step(self):
        self.may_step.wait()
        time.sleep(self.pause)
        self.steps += 1
        if self.failure:
            raise self.failure
        updates: list[Update] = []
        for completion, most in list(self.asked.values())[:SLOTS]:
            new = 0 if completion.finish_reason else 1
            completion.tokens += [len(completion.tokens) % 257] * new
            completion.logprobs += [0.0] * new
            completion.times += [0.0] * new
            if len(completion.tokens) == most:
                completion.finish_reason = "length"
            updates.append(Update(completion, new))
            if completion.finish_reason:
                del self.asked[completion.number]
        return updates
