"""Writes a run's model as a directory that transformers and vLLM load.

The program is jmoe/commands/export_hf.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.export_hf import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
