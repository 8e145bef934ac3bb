"""Generated arithmetic: sheets of worked problems, the same ones every time.

Every answer is preceded by the steps that lead to it, so that a small model can learn
the procedure instead of a table of results.
"""

import math
import random
from collections.abc import Iterator

NUM_SHEETS = 3000
PROBLEMS_PER_SHEET = 16
_SEED = 20240612


def documents() -> Iterator[str]:
    """Yields sheets of problems of one kind, in a fixed order."""
    rng = random.Random(_SEED)
    for _ in range(NUM_SHEETS):
        problem = rng.choice(_KINDS)
        yield "\n".join(problem(rng) for _ in range(PROBLEMS_PER_SHEET))


def _number(rng: random.Random, max_digits: int) -> int:
    """Returns a number; every length up to `max_digits` is as likely as any other."""
    return rng.randrange(10 ** rng.randint(1, max_digits))


def _addition(rng: random.Random) -> str:
    a, b = _number(rng, 5), _number(rng, 5)
    steps, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = (number // 10**place % 10 for number in (a, b))
        carried = f" + {carry}" if carry else ""
        carry, digit = divmod(x + y + carry, 10)
        steps.append(f"{x} + {y}{carried} = {10 * carry + digit}")
    worked = ", ".join(steps)
    return f"What is {a} + {b}? From the right, {worked}: {a} + {b} = {a + b}."


def _subtraction(rng: random.Random) -> str:
    small, large = sorted((_number(rng, 5), _number(rng, 5)))
    difference = large - small
    return (
        f"What is {large} - {small}? It is {difference}, "
        f"because {small} + {difference} = {large}."
    )


def _multiplication(rng: random.Random) -> str:
    a, b = _number(rng, 4), _number(rng, 3)
    parts = [
        int(digit) * 10**place
        for place, digit in zip(range(len(str(b)))[::-1], str(b), strict=True)
    ]
    sums = " + ".join(f"{a} * {part}" for part in parts)
    products = " + ".join(str(a * part) for part in parts)
    return f"What is {a} * {b}? It is {sums} = {products} = {a * b}."


def _division(rng: random.Random) -> str:
    a, b = _number(rng, 5), _number(rng, 2) + 1
    quotient, rest = divmod(a, b)
    return (
        f"What is {a} divided by {b}? It is {quotient}, remainder {rest}, "
        f"because {b} * {quotient} = {a - rest} and {a} - {a - rest} = {rest}."
    )


def _greatest_common_divisor(rng: random.Random) -> str:
    a, b = _number(rng, 3) + 1, _number(rng, 3) + 1
    steps, x, y = [], a, b
    while y:
        x, y = y, x % y
        steps.append(f"gcd({x}, {y})")
    return f"What is gcd({a}, {b})? It is {' = '.join(steps)} = {math.gcd(a, b)}."


def _comparison(rng: random.Random) -> str:
    numbers = [_number(rng, 4) for _ in range(rng.randint(2, 6))]
    listed = ", ".join(map(str, numbers))
    ordered = " <= ".join(map(str, sorted(numbers)))
    return f"Which of {listed} is the largest? {ordered}, so it is {max(numbers)}."


def _sequence(rng: random.Random) -> str:
    first, step = _number(rng, 3), _number(rng, 2) + 1
    terms = [first + step * i for i in range(rng.randint(4, 6))]
    listed = ", ".join(map(str, terms[:-1]))
    return (
        f"What comes after {listed}? Each number is {step} more than "
        f"the one before, so {terms[-2]} + {step} = {terms[-1]}."
    )


def _purchase(rng: random.Random) -> str:
    thing = rng.choice(("pencils", "apples", "tickets", "books", "stamps", "bricks"))
    count, price, paid = rng.randint(2, 40), rng.randint(2, 60), _number(rng, 2)
    cost = count * price
    return (
        f"{count} {thing} at {price} cents each, paid with {cost + paid} cents: "
        f"what is the change? {count} * {price} = {cost}, "
        f"and {cost + paid} - {cost} = {paid} cents."
    )


_KINDS = (
    _addition,
    _subtraction,
    _multiplication,
    _division,
    _greatest_common_divisor,
    _comparison,
    _sequence,
    _purchase,
)
