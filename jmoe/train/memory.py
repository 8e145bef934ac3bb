"""Moved: see `jmoe.train.runtime`."""

from jmoe.train.runtime import keep_freed_memory as keep_freed_memory
