"""Trains a model; run it again with the same --workdir to go on where it stopped.

The program is jmoe/commands/train.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.train import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
