"""Scripts as a shell runs them, and a small run that they trained."""

import contextlib
import io
import pathlib
import runpy
import sys
from typing import NamedTuple

import pytest
from absl import flags

ROOT = pathlib.Path(__file__).parents[2]
FLAGS_OF = (str(ROOT / "scripts"), "jmoe.commands.", "experiments.")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def mistake(self) -> str:
        """The one line that says what was wrong, and all that was said."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("error: ") and self.err.count("\n") == 1
        return self.err


def run_script(name: str, *arguments: str) -> Outcome:
    """Runs scripts/<name>.py to its exit, in this process: JAX takes long to start."""
    path = str(ROOT / "scripts" / f"{name}.py")
    forget_flags()
    argv, sys.argv = sys.argv, [path, *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as end:
                runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = argv
    return Outcome(end.value.code or 0, out.getvalue(), err.getvalue())


def forget_flags() -> None:
    """Forgets flags of scripts that ran before; a process has one set of flags."""
    for name in list(flags.FLAGS):
        module = flags.FLAGS.find_module_defining_flag(name)
        if module == "<run_path>" or module.startswith(FLAGS_OF):
            delattr(flags.FLAGS, name)
    for module in [name for name in sys.modules if name.startswith("jmoe.commands.")]:
        del sys.modules[module]  # its next import defines them again


@pytest.fixture(scope="session")
def without_flags():
    """A context at whose beginning and end no program's flags are defined."""

    @contextlib.contextmanager
    def context():
        forget_flags()
        yield
        forget_flags()

    return context


@pytest.fixture(scope="session")
def script():
    return run_script


@pytest.fixture(scope="session")
def smallest_arguments(tmp_path_factory) -> list[str]:
    """What makes scripts/train.py train the smallest run on a small text."""
    directory = tmp_path_factory.mktemp("smallest")
    documents = (f"The square of {i} is {i * i}. " * 3 for i in range(80))
    text = directory / "squares.txt"
    text.write_text("<|endoftext|>".join(documents))
    return [
        f"--experiment={ROOT / 'tests' / 'smallest_run.py'}",
        f"--set=data.sources=[{{'path': '{text}'}}]",
        f"--set=data.cache_dir={directory / 'cache'}",
    ]


@pytest.fixture(scope="session")
def trained(script, smallest_arguments, compile_once, tmp_path_factory) -> pathlib.Path:
    """The directory of a run that scripts/train.py trained."""
    workdir = tmp_path_factory.mktemp("runs") / "smallest"
    with compile_once():
        outcome = script("train", f"--workdir={workdir}", *smallest_arguments)
    assert outcome.code == 0, outcome.err
    (workdir / "terminal").write_text(outcome.out + outcome.err)
    return workdir
