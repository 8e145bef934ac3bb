"""Shows a run or a vLLM server on a live page, from outside.

The program is jmoe/commands/monitor.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.monitor import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
