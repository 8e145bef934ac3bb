"""What the README tells to type can be typed, and what it points to is there."""

import pathlib
import re
import runpy
import shlex

import pytest

from jmoe.config import RunConfig, override, presets

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(
    r"^    .*python scripts/train.py(.*)$", README.replace("\\\n", ""), re.M
)
PLACE = ("--coordinator=", "--num_processes=", "--process_id=")  # of a process


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_training_command_describes_a_run(arguments):
    words = shlex.split(arguments, comments=True)
    words = [word for word in words if not word.startswith(PLACE)]
    run = presets.tiny_run()
    if words and words[0].startswith("--experiment="):
        path = words.pop(0).partition("=")[2]
        run = runpy.run_path(str(ROOT / path))["get_config"]()
    assert set(words[::2]) <= {"--set"}
    assert isinstance(override(run, words[1::2]), RunConfig)


def test_the_map_has_every_folder_of_the_library():
    mapped = re.findall(r"^\| `(jmoe/\w+)` \|", README, re.M)
    there = [path.parent.relative_to(ROOT) for path in ROOT.glob("jmoe/*/__init__.py")]
    assert sorted(mapped) == sorted(map(str, there))


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"[\w./]+\.(?:py|ipynb|md)\b", README))
    assert len(named) > 10
    for path in named:
        assert any(ROOT.glob(path)) or any(ROOT.glob(f"*/{path}")), path
