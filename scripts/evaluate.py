"""Evaluates a run's model on held-out text, with its weights in several forms.

The program is jmoe/commands/evaluate.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.evaluate import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
