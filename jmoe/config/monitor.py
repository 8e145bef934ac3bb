"""Where a run's live page is."""

import dataclasses

from jmoe.config import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """A page about the run while it trains, and its metrics for Prometheus.

    Nobody can change anything there. Whoever can reach `host` can read all of it.
    """

    port: int | None = None  # None: no page
    host: str = "127.0.0.1"  # of process 0; 0.0.0.0 is for all that can reach it

    def __post_init__(self):
        if self.port is not None:
            checks.at_least(self, port=1)
            checks.at_most(self, port=65_535)
        if not self.host:
            raise ValueError("host='' must be the name or the address of a machine.")
