"""Makes a directory that transformers or vLLM load into a run.

The program is jmoe/commands/import_hf.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.import_hf import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
