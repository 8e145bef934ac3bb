"""Shows, before anything runs, what a choice would come to.

The program is jmoe/commands/plan.py. --help shows what it takes.
"""

import sys

try:
    from jmoe.commands.plan import start
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}; `pip install -e .` installs jmoe and what it needs.")

if __name__ == "__main__":
    start()
