"""What the pages tell to type can be typed, and what they point to is there."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import json
import pathlib
import re
import runpy
import shlex
import tomllib
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from jmoe.balance import bias
from jmoe.checkpoint.retention import parse_which
from jmoe.config import (
    MeshConfig,
    ModelConfig,
    MonitorConfig,
    RunConfig,
    override,
    presets,
)
from jmoe.config.serve import ServeConfig
from jmoe.decode.limits import Limits
from jmoe.nn.quantized import FORMS
from tests import pages
from tests.pages import PAGES, ROOT
from tests.test_layout import LAYERS

RESULTS = ROOT / "experiments" / "results"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MESH = re.compile(r"(mesh=)?((data|pipe|expert|tensor)=\d+,?)+")
PATH = re.compile(r"(?<![\w./~])(?:jmoe|tests|scripts|experiments|docs)(?:/[\w.*]+)+")
FILE = re.compile(r"(?<![\w./~<-])[\w./]+\.(?:py|ipynb|md|sh)\b")

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES]
)
COMMANDS = [(page, words) for page in PAGES for words in pages.commands(page)]
SCRIPTS = [
    pytest.param(page, *pages.script_of(words), id=f"{page.name}: {shlex.join(words)}")
    for page, words in COMMANDS
    if pages.script_of(words)
]
FIGURES = [row for page in PAGES for row in pages.figures(page)]


def test_the_readme_is_read_in_a_few_minutes():
    assert len(pages.read(ROOT / "README.md").splitlines()) <= 150


@each_page
def test_a_link_leads_somewhere(page):
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in pages.anchors(file.resolve()), target


def test_every_page_is_in_the_index():
    linked = {
        target.partition("#")[0] for target in pages.links(ROOT / "docs/README.md")
    }
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - linked == {
        "README.md"
    }


def test_the_map_has_every_folder_of_the_library_in_its_order():
    text = pages.read(ROOT / "docs" / "architecture.md")
    assert re.findall(r"^\| `jmoe/(\w+)` \|", text, re.M) == list(LAYERS)


def test_every_file_in_the_drawing_exists():
    strings = re.findall(
        r'"([\w/]+\.py)"', (ROOT / "docs" / "draw_step.py").read_text()
    )
    assert len(strings) > 10
    assert [name for name in strings if not (ROOT / "jmoe" / name).exists()] == []


@each_page
def test_every_file_and_folder_that_is_named_exists(page):
    text = pages.read(page)
    own = {block.file for block in pages.blocks(page)}
    for path in {*PATH.findall(text), *FILE.findall(text)} - own:
        path = path.rstrip(".")
        if path.partition(".")[0].isupper():
            continue  # a word that stands for a name
        assert any(ROOT.glob(path)) or any(ROOT.glob(f"*/{path}")), path


@pytest.mark.parametrize(("page", "script", "arguments"), SCRIPTS)
def test_a_script_takes_what_it_is_told(page, script, arguments, tmp_path):
    if script in {block.file for block in pages.blocks(page)}:
        return  # a file of the reader's
    if "<" in " ".join(arguments):
        pytest.fail("A command has a placeholder; let it be one that can be typed.")
    given, namespace = parse(script, arguments)
    rest = given.pop("")
    assert rest == [] or rest[0] in namespace["COMMANDS"] and not rest[1:]
    check(pathlib.Path(script).stem, given, namespace, page, tmp_path)


def check(name, given, namespace, page, tmp_path) -> None:
    """Builds what the flags describe, as far as that costs nothing."""
    assignments = given.get("set", [])
    if name == "generate":
        override(Limits(), assignments)
    elif name == "monitor":
        override(MonitorConfig(), assignments)
    elif name == "serve":
        override(ServeConfig(name="a_model"), assignments)
    elif name == "bench" and assignments:
        suite = importlib.import_module(namespace["SUITES"][given["suite"]])
        override(suite.Settings(), assignments)
    elif name == "train":
        experiment = given["experiment"]
        written = [b for b in pages.blocks(page) if b.file == experiment]
        if written:
            experiment = str(tmp_path / "experiment.py")
            pathlib.Path(experiment).write_text(written[0].text)
        elif experiment.startswith("runs/"):
            experiment = "tiny"
        elif experiment.endswith(".py"):
            experiment = str(ROOT / experiment)
        namespace["read_experiment"](experiment, assignments)
    else:
        override(presets.tiny_run(), assignments)
    parse_which(given.get("step"))
    if name == "plan" or given.get("dry_run"):
        ModelConfig.preset(given["model"])
    weights = given.get("weights") or []
    assert {weights} <= set(FORMS) if isinstance(weights, str) else not weights


def parse(script: str, arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a script's own flags after these arguments, and its namespace."""
    path = ROOT / "jmoe" / "commands" / pathlib.Path(script).name
    own = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        defining = [name for name in dir(flags) if name.startswith("DEFINE_")]
        for name in [*defining, "register_validator"]:
            define = functools.partial(getattr(flags, name), flag_values=own)
            patch.setattr(flags, name, define)
        namespace = runpy.run_path(str(path if path.exists() else ROOT / script))
    rest = own([script, *arguments])[1:]
    return {**own.flag_values_dict(), "": rest}, namespace


def test_a_flag_that_no_script_has_is_noticed():
    with pytest.raises(flags.Error):
        parse("scripts/train.py", ["--steps=3"])


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS], ids=lambda words: shlex.join(words)
)
def test_what_is_installed_and_tested_is_there(words):
    extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
    assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
    options = PROJECT["tool"]["pytest"]["ini_options"]
    if words and pathlib.PurePath(words[0]).name == "pytest":
        tests = [word for word in words[1:] if word.startswith("tests")]
        assert all((ROOT / path.partition("::")[0]).exists() for path in tests)
        if "-m" in words:
            markers = [marker.partition(":")[0] for marker in options["markers"]]
            assert words[words.index("-m") + 1] in markers
    installed = PROJECT["project"]["scripts"]
    assert all(word in installed for word in words[:1] if word.startswith("jmoe-"))


@each_page
def test_a_session_answers_as_it_is_shown(page):
    for block in filter(lambda block: block.is_session, pages.blocks(page)):
        command, _, answer = block.text.partition("\n")
        given, namespace = parse(*pages.script_of(shlex.split(command)))
        with pytest.raises(ValueError) as raised:
            namespace["read_experiment"](given["experiment"], given["set"])
        shown = re.escape(" ".join(answer.split())).replace(re.escape("..."), ".*")
        assert re.fullmatch(shown, f"error: {raised.value}")


@each_page
def test_a_setting_in_the_text_is_one(page):
    for span in pages.spans(page):
        told = re.fullmatch(r"--set (?!path\.to)(.+)", span)
        if told:
            (assignment,) = shlex.split(told[1])
            assert applies(assignment), span
        elif re.fullmatch(r"[a-z_]+(\.[\w*]+)*=\S+", span) and not MESH.fullmatch(span):
            if span.partition("=")[0].partition(".")[0] in known("").keys():
                assert applies(span), span
        elif re.fullmatch(r"[a-z_]+(\.[\w*]+)+", span):
            if span.partition(".")[0] in known(""):
                assert is_field(span), span
    for path, name in pages.fields_of(page):
        assert name in known(path), f"{path}.{name}"


def applies(assignment: str) -> bool:
    """Returns whether the tiny run or a server takes the assignment."""
    refused = []
    for record in (presets.tiny_run(), ServeConfig(name="a_model")):
        try:
            override(record, [assignment])
        except ValueError as error:
            refused.append(error)
    return len(refused) < 2


def is_field(path: str) -> bool:
    """Returns whether it is the path of a field, or the name of a file."""
    *parents, name = path.split(".")
    return name in known(".".join(parents)) or name in ("py", "json", "npy", "jsonl")


@functools.cache
def known(path: str) -> dict[str, Any]:
    """Returns fields and their types of the record at a path of a run or server."""
    hints = [RunConfig, ServeConfig]
    for name in filter(None, path.split(".")):
        inner = [typing.get_type_hints(hint).get(name) for hint in records(hints)]
        if name == "*":
            inner = [hint for outer in hints for hint in typing.get_args(outer)]
        hints = [hint for hint in inner if hint is not None]
    found: dict[str, Any] = {}
    for hint in records(hints):
        found |= typing.get_type_hints(hint)
    return found


def records(hints: list[Any]) -> list[Any]:
    """Returns the records that any of the types may be."""
    each = [inner for hint in hints for inner in (hint, *typing.get_args(hint))]
    return [hint for hint in each if dataclasses.is_dataclass(hint)]


PYTHON = [
    pytest.param(block.text, block.file, id=f"{page.name}: {number}")
    for page in PAGES
    for number, block in enumerate(pages.blocks(page))
    if block.language == "python"
]


@pytest.mark.parametrize(("code", "file"), PYTHON)
def test_python_in_a_page_runs_as_far_as_it_needs_no_run(code, file):
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert can_be_imported(node.module, name.name), name.name
    namespace: dict[str, Any] = {"__name__": "a_page"}
    if file is not None and (ROOT / file).exists():
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        namespace |= vars(module)
    if "runs/" not in code and "absent_devices" not in code:
        exec(compile(tree, "a page", "exec"), namespace)
        if "def get_config" in code:
            assert isinstance(namespace["get_config"](), RunConfig)


def can_be_imported(module: str | None, name: str) -> bool:
    """Returns whether `from module import name` works."""
    assert module is not None
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


def test_the_rule_of_ones_own_is_a_rule():
    (rule,) = (
        block.text
        for block in pages.blocks(ROOT / "docs" / "balancing.md")
        if "def tolerant" in block.text
    )
    namespace = dict(vars(bias))
    exec(rule, namespace)
    load_E = jnp.array([95, 105, 80, 120])
    got = namespace["tolerant"](jnp.zeros(4), load_E, rate=0.5)
    np.testing.assert_array_equal(got, [0, 0, 0.5, -0.5])


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: row.what)
def test_a_figure_is_in_what_its_command_wrote(row):
    given, _ = parse(*pages.script_of(shlex.split(row.command)))
    stem = pathlib.Path(shlex.split(row.command)[1]).stem
    if stem == "check_hopper":
        stem = "hopper" if given["suite"] == "mesh" else f"hopper_{given['suite']}"
    stem = given["suite"] if stem == "bench" else stem
    result = json.loads((RESULTS / f"{stem}.json").read_text())
    there = list(pages.numbers_in(result.get("figures", result)))
    assert row.numbers
    for number in row.numbers:
        assert any(
            is_rounded(x, number) for x in [*there, *(100 * x for x in there)]
        ), f"{number} is not in {stem}.json: {row.what}"


def is_rounded(x: float, text: str) -> bool:
    """Returns whether the text is `x` to so many places, or to three digits."""
    value = float(text.replace(",", ""))
    decimals = len(text.partition(".")[2])
    return abs(x - value) <= max(
        0.5001 * 10**-decimals, 5e-4 * abs(value) * (not decimals)
    )


def test_a_message_that_is_explained_is_in_the_code():
    texts = "\n".join(
        node.value
        for path in (ROOT / "jmoe").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    explained = [parts for page in PAGES for parts in pages.messages(page)]
    assert len(explained) > 10
    for parts in explained:
        assert [part for part in parts if part not in texts] == []


def test_a_mesh_in_the_text_is_one():
    for page in PAGES:
        for span in filter(MESH.fullmatch, pages.spans(page)):
            MeshConfig.parse(span.removeprefix("mesh="))
