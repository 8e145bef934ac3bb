"""Serves an exported model over an OpenAI-compatible HTTP API.

The program is jmoe/commands/serve.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.serve import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
