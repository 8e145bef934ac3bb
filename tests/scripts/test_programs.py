"""All programs alike: a script, a command that pip installs, and a clone without."""

import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OF_A_CLONE = {"bench", "check_hopper"}  # they measure what isn't installed


@pytest.mark.parametrize("name", SCRIPTS)
def test_where_jmoe_is_not_installed_one_line_says_how_to(name, tmp_path):
    script = ROOT / "scripts" / f"{name}.py"
    command = [sys.executable, "-I", "-S", str(script)]  # without site-packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "`pip install -e .` installs jmoe" in done.stderr


def test_every_script_is_a_command_too_but_those_of_a_clone():
    installed = {
        name.replace("_", "-"): f"jmoe.commands.{name}:start"
        for name in set(SCRIPTS) - OF_A_CLONE
    }
    want = {f"jmoe-{name}": target for name, target in installed.items()}
    assert PROJECT["project"]["scripts"] == want


def test_help_is_of_the_program(script):
    outcome = script("generate", "--help")
    assert outcome.out.startswith("Completes prompts with the model of a run")
    assert "python scripts/generate.py --num_samples=3" in outcome.out
    assert "--max_new_tokens: " in outcome.out and "--helpfull" in outcome.out


def test_types_are_published():
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["jmoe"]
    assert (ROOT / "jmoe" / "py.typed").exists()
