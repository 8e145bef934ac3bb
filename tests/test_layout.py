"""The architecture, as far as it can be read off the source.

These tests fail when an import, a file or a command line outgrows the design. What
they forbid may still be right one day: then the change belongs here, as a decision.
"""

import ast
import functools
import pathlib
from collections.abc import Iterator

import jax
import pytest

from jmoe.balance import dropping
from jmoe.config import attention, model, run
from jmoe.nn.model import Transformer, make_variables
from jmoe.ops import fp8, grouped, rope
from jmoe.parallel import exchange, travel
from jmoe.train import muon, optimizer, schedules

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("jmoe", "scripts", "experiments", "tests")

# Each folder of jmoe imports itself and those to its left.
LAYERS = (
    "config",
    "ops",
    "balance",
    "parallel",
    "nn",
    "families",
    "data",
    "checkpoint",
    "monitor",
    "train",
    "decode",
    "evals",
    "export",
    "plan",
    "serve",
    "commands",
)
ONLY_IN = {"torch": "export", "transformers": "export", "vllm": "serve", "ray": "serve"}
OPTIONAL = ("torch", "transformers")  # for checks; export itself works without them

MAX_LINES = 400
MAX_KERNEL_LINES = 500  # in jmoe/ops/kernels

# Every command-line flag there is. What a run can be told is a field of its record,
# reached by --set; a flag is for what isn't part of any record.
FLAGS = {
    "experiments/fp8_vs_bf16.py": ["workdir", "set", "seeds", "runs"],
    "experiments/loss_free_vs_frozen.py": ["workdir", "set"],
    "scripts/bench.py": ["suite", "repeats", "set"],
    "scripts/check_hopper.py": ["suite", "program", "environment"],
    "experiments/tiny_math.py": ["workdir", "set", "math500"],
    "jmoe/commands/evaluate.py": [
        *("workdir", "model", "step", "weights", "set", "task", "data", "limit"),
        *("samples", "temperature", "max_new_tokens", "seed", "out"),
        *("endpoint", "endpoint_model", "endpoint_api", "concurrency"),
    ],
    "jmoe/commands/export_hf.py": [
        *("workdir", "out", "step", "dtype", "format", "shard_gb", "dry_run"),
        "model",
    ],
    "jmoe/commands/generate.py": [
        *("workdir", "model", "step", "weights"),
        *("prompt", "prompts", "interactive", "output", "num_samples"),
        # of a request, whose record is no run's and no engine's
        *("max_new_tokens", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "stop", "seed"),
        *("drafts", "set"),
    ],
    "jmoe/commands/monitor.py": ["workdir", "endpoint", "set"],
    "jmoe/commands/plan.py": [
        "pp",
        "microbatches",
        "schedule",
        "chunks",
        "costs",
        "model",
        "weights",
        "out",
    ],
    "jmoe/commands/serve.py": [
        *("model", "engine", "local", "step", "mtp"),
        *("coordinator", "num_processes", "process_id"),  # as train.py has them
        "set",
    ],
    "jmoe/commands/import_hf.py": ["model", "workdir", "dtype", "fp8", "set"],
    "jmoe/commands/train.py": [
        "experiment",
        "workdir",
        "set",
        # who a process is, which differs between the processes of one run
        "coordinator",
        "num_processes",
        "process_id",
    ],
}

# How a docstring doesn't open: it is a sentence that stands alone, such as "Returns the
# rows of ...", not "The rows of ..." or "Of each expert.". A property's may be a noun.
NO_OPENING = {
    "function": "A All An As At By Each Every For From How In Its Of On One Some That "
    "The Those To What When Where Whether Which Who With Without",
    "property": "As At By From Of Returns That Those With",
    "class": "As At By From Of Over Returns That Those Where Which Who Why With",
    "module": "As Of That Those",
}

# Collectives have the names that JAX gives them; the others are no collectives.
COLLECTIVES = {
    *("psum", "pmax", "all_gather", "reduce_scatter", "all_to_all", "ppermute"),
}
LOCAL = {"Axes", "axis_index", "axis_size", "local_part", "platform", "share"}
JAX_COLLECTIVES = {
    *("all_gather", "all_to_all", "pcast", "pmax", "pmean", "pmin", "ppermute", "psum"),
    *("psum_scatter", "pvary", "ragged_all_to_all"),
}

# What parameters are called is known where a module makes them, and in their family's
# table of names; others read their records (`jmoe.nn.parameter`). Of these names, some
# mean other things as well, and tell nothing:
COMMON_NAMES = {
    *("params", "router_state"),  # collections
    *("dense", "moe", "block"),  # kinds of layers; recomputation
    *("head", "key", "kernel", "mlp", "norm", "out", "query", "scale", "value"),
}
# And some have to be known elsewhere:
NAMED = {
    # a pipeline hands the table of embeddings to what makes the logits
    "jmoe/train/pipelined.py": {"embedding"},
    # a decoder takes the model's parameters apart
    "jmoe/decode/weights.py": {"embedding", "final_norm", "mtp_0"},
    # a checkpoint of Hugging Face's may repeat it, or leave it to be the head
    "jmoe/export/names.py": {"embedding"},
    "jmoe/export/export_run.py": {"embedding"},
    "jmoe/export/published.py": {"bias"},  # Hugging Face's
    # tables that tell parts of a model apart: by a module's name, which is all that a
    # compiled program and a tree of weights have of it
    "jmoe/plan/memory.py": {
        *("attention", "embedding", "experts", "project", "router", "shared"),
    },
    "jmoe/plan/numerics.py": {"attention", "experts", "router"},
    "jmoe/evals/fp8_ranges.py": {"down", "gate_up"},
}

FILES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
)
LIBRARY = [path for path in FILES if path.parts[0] == "jmoe"]


def test_a_module_imports_only_its_own_layer_and_those_before_it():
    found = [line for path in LIBRARY for line in misplaced_imports(path, read(path))]
    assert not found, "\n".join(found)


def test_no_import_is_relative():
    found = [
        f"{path}:{node.lineno}"
        for path in FILES
        for node in imports_from(read(path))
        if node.level
    ]
    assert not found, "Write these imports out, from their root:\n" + "\n".join(found)


def test_a_file_is_short_enough_to_read():
    found = []
    for path in FILES:
        is_kernel = path.is_relative_to("jmoe/ops/kernels")
        limit = MAX_KERNEL_LINES if is_kernel else MAX_LINES
        lines = len((ROOT / path).read_text().splitlines())
        if lines > limit:
            found.append(f"{path} has {lines} lines, more than {limit}: split it.")
    assert not found, "\n".join(found)


def test_a_new_flag_is_a_decision():
    defined = {path.as_posix(): list(flags(read(path))) for path in FILES}
    assert {path: names for path, names in defined.items() if names} == FLAGS, (
        "The command lines are not those listed in FLAGS. Could a new flag be a field "
        "of a record instead?"
    )


def test_a_docstring_is_a_sentence_that_stands_alone():
    found = [
        f"{path}:{line}: {text.splitlines()[0]!r}"
        for path in FILES
        for kind, line, text in docstrings(read(path))
        if text.split()[0] in openings(path, kind)
    ]
    assert not found, "Say what it returns or does:\n" + "\n".join(found)


def openings(path: pathlib.Path, kind: str) -> set[str]:
    """Returns the words that no docstring of this kind opens with there."""
    return set(NO_OPENING[kind].split()) if path.parts[0] == "jmoe" else {"Of"}


def test_no_two_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for path in LIBRARY:
        for node in ast.walk(read(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_collectives_have_the_fields_names_and_one_home():
    found = []
    for path in FILES:
        used = set(attributes_of(read(path), "collectives")) - COLLECTIVES - LOCAL
        found += [f"{path}: {name} is no collective" for name in used]
        direct = JAX_COLLECTIVES & set(attributes_of(read(path), "lax"))
        if path in LIBRARY and not path.is_relative_to("jmoe/parallel"):
            found += [f"{path}: call {name} in jmoe/parallel" for name in direct]
    assert not found, "\n".join(found)


def test_the_module_of_collectives_has_no_others():
    tree = read(pathlib.Path("jmoe/parallel/collectives.py"))
    public = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    assert public | {"Axes"} == COLLECTIVES | LOCAL


def test_a_parameters_name_is_known_to_its_module_and_its_family_alone():
    names = parameter_names("tiny", "glm4_air") - COMMON_NAMES
    assert {"kv_up", "gate_up", "query_norm", "router"} <= names
    found = {
        path.as_posix(): used
        for path in LIBRARY
        if path.parts[1] not in ("nn", "families")
        and (used := names & set(strings(read(path))))
    }
    assert found == NAMED


def parameter_names(*presets: str) -> set[str]:
    """Returns the names of all parameters of these models, and of their modules."""
    trees = [
        jax.eval_shape(lambda cfg=cfg: make_variables(Transformer(cfg), 0))
        for cfg in map(model.ModelConfig.preset, presets)
    ]
    paths = [path for path, _ in jax.tree.leaves_with_path(trees)]
    return {key.key for path in paths for key in path[1:]}


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (run.SCHEDULES, schedules.SCHEDULES),
        (run.OPTIMIZERS, optimizer.OPTIMIZERS),
        (run.MUON_SCALES, muon.SCALES),
        (run.PRECISIONS, ["native", *fp8.RECIPES]),
        (model.EXPERT_BACKENDS, grouped.BACKENDS),
        (model.EXCHANGES, exchange.BACKENDS),
        (model.WIRE_DTYPES, travel.WIRES),
        (model.DROP_ORDERS, dropping.DROP_ORDERS),
        (attention.ROPE_PAIRS, rope.ROTATIONS),
    ],
    ids=[
        "schedules",
        "optimizers",
        "muon_scales",
        "precisions",
        "expert_backends",
        "exchanges",
        "wire_dtypes",
        "drop_orders",
        "rope_pairs",
    ],
)
def test_the_names_a_record_allows_are_those_of_its_table(names, table):
    assert names == tuple(table)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jmoe/ops/loss.py", "from jmoe.nn.model import Transformer"),
        ("jmoe/ops/loss.py", "from jmoe import nn"),
        ("jmoe/ops/loss.py", "import jmoe.nn.model as model"),
        ("jmoe/ops/loss.py", "def f():\n    import jmoe.train.loop"),
        ("jmoe/ops/loss.py", "import jmoe"),
        ("jmoe/ops/loss.py", "from jmoe import *"),
        ("jmoe/__init__.py", "from jmoe import config"),
        ("jmoe/tricks/new.py", "import jax"),
        ("jmoe/train/loop.py", "from scripts import train"),
        ("jmoe/train/loop.py", "import experiments.tiny_muon"),
        ("jmoe/train/loop.py", "import tests.conftest"),
        ("jmoe/nn/model.py", "import torch.nn as nn"),
        ("jmoe/export/hf.py", "from ray import serve"),
        ("jmoe/export/hf.py", "import transformers"),
    ],
)
def test_an_import_out_of_place_is_found(path, source):
    assert list(misplaced_imports(pathlib.Path(path), ast.parse(source)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("jmoe/train/loop.py", "from jmoe.balance import load\nimport jmoe.train.step"),
        ("jmoe/export/hf.py", "def check():\n    import transformers"),
        ("jmoe/serve/app.py", "from ray import serve"),
        ("jmoe/ops/loss.py", "import jax.experimental.pallas\nimport rayleigh"),
    ],
)
def test_an_import_in_its_place_is_left_alone(path, source):
    assert not list(misplaced_imports(pathlib.Path(path), ast.parse(source)))


@functools.cache
def read(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def misplaced_imports(path: pathlib.Path, tree: ast.Module) -> Iterator[str]:
    """What a module of jmoe may not import, wherever in the module it does so."""
    layer = path.parts[1] if len(path.parts) > 2 else ""
    if layer and layer not in LAYERS:
        yield f"{path}: {layer!r} is not one of the layers {', '.join(LAYERS)}."
        return
    allowed = LAYERS[: LAYERS.index(layer) + 1] if layer else ()
    for node, name in imports(tree):
        package, _, inside = name.partition(".")
        where = f"{path}:{node.lineno}: {name}:"
        if package == "jmoe" and inside.partition(".")[0] not in allowed:
            yield f"{where} this layer imports only {', '.join(allowed) or 'nothing'}."
        if package in ("scripts", "experiments", "tests"):
            yield f"{where} jmoe must work without {package}."
        if ONLY_IN.get(package, layer) != layer:
            yield f"{where} {package} may be imported only in {ONLY_IN[package]}."
        if package in OPTIONAL and node.col_offset == 0:
            yield f"{where} import {package} inside the function that needs it."


def imports(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Everything imported, by its dotted name; `from a import b` imports a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
    for node in imports_from(tree):
        yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def imports_from(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))


def docstrings(tree: ast.Module) -> Iterator[tuple[str, int, str]]:
    """Yields kind, line and text of each docstring there is."""
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if not isinstance(node, functions | ast.ClassDef | ast.Module):
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        kind = "module" if isinstance(node, ast.Module) else "class"
        if isinstance(node, functions):
            named = " ".join(map(ast.unparse, node.decorator_list))
            kind = "property" if "property" in named else "function"
        yield kind, getattr(node, "lineno", 1), text


def attributes_of(tree: ast.Module, name: str) -> Iterator[str]:
    """Yields what is read of `name`, as in `name.attribute` and `x.name.attribute`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of = node.value
            if name in (getattr(of, "id", None), getattr(of, "attr", None)):
                yield node.attr


def strings(tree: ast.Module) -> Iterator[str]:
    """Yields every string that is written out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def flags(tree: ast.Module) -> Iterator[str]:
    """Names given to absl's DEFINE_string and its like, in the order of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr.startswith("DEFINE_"):
                yield ast.literal_eval(node.args[0])
