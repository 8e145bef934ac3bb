"""Completes prompts with the model of a run, or of a Hugging Face directory.

The program is jmoe/commands/generate.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.generate import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
