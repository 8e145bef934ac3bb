"""The embedded corpus: enough of it, the same every time, and right."""

import argparse
import ast
import dataclasses
import hashlib
import inspect
import json.decoder
import math
import os
import re
import subprocess
import sys

import pytest

from jmoe.config.data import BUILTIN_DOMAINS
from jmoe.data import builtin

MODULE = '''"""Says what it does."""

class A:
    """Of a class.

    Ünïcode."""

    def f(self):
        """Nothing but this."""

    def g(self): "beside code"
'''
CODE = """class A:

    def f(self):
        pass

    def g(self): "beside code"
"""
PROSE = """m

Says what it does.

m.A

Of a class.

Ünïcode.

m.A.f

Nothing but this."""


def bare(source: str) -> str:
    """The syntax tree without docstrings and the `pass` that may stand for one."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, builtin.Definition):
            statements = node.body[ast.get_docstring(node) is not None :]
            node.body = [s for s in statements if not isinstance(s, ast.Pass)]
    return ast.dump(tree)


def test_a_module_is_split_as_in_the_example():
    assert builtin.split_docstrings("m", MODULE) == (CODE.strip("\n"), PROSE)


@pytest.mark.parametrize(
    "module, name",
    [
        (argparse, "ArgumentParser"),
        (dataclasses, "replace"),
        (json.decoder, "JSONDecoder"),
        (os, "walk"),
    ],
)
def test_code_without_docstrings_is_the_same_program(module, name):
    source = inspect.getsource(module)
    code, prose = builtin.split_docstrings(module.__name__, source)
    assert bare(code) == bare(source)
    assert len(code) < len(source)
    assert inspect.getdoc(module.__dict__[name]) in prose


@pytest.mark.parametrize("domain", BUILTIN_DOMAINS)
def test_every_domain_holds_enough_to_learn_from(domain):
    documents = list(builtin.documents((domain,)))
    assert sum(map(len, documents)) > 1_000_000
    assert len(documents) > 300
    assert all(document.strip() for document in documents)


def test_another_process_finds_the_same_documents():
    digest = (
        "import hashlib; from jmoe.data import builtin; "
        "print(hashlib.sha256(repr(list(builtin.documents())).encode()).hexdigest(), "
        "builtin.fingerprint())"
    )
    other = subprocess.run(
        [sys.executable, "-c", digest],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = hashlib.sha256(repr(list(builtin.documents())).encode()).hexdigest()
    assert other.stdout.split() == [here, builtin.fingerprint()]


def test_every_equation_holds():
    sheets = "\n".join(builtin.documents(("arithmetic",)))
    chains = re.findall(r"(?<![\d*+-] )\b\d+(?: [-+*=] \d+)* = \d[\d +*=-]*\b", sheets)
    assert len(chains) > 10_000
    for chain in chains[::7]:
        assert len({eval(side) for side in chain.split(" = ")}) == 1, chain


def test_every_common_divisor_is_right():
    sheets = "\n".join(builtin.documents(("arithmetic",)))
    solved = re.findall(r"is gcd\((\d+), (\d+)\)\?.* = (\d+)\.", sheets)
    assert len(solved) > 1_000
    assert all(math.gcd(int(a), int(b)) == int(c) for a, b, c in solved)
