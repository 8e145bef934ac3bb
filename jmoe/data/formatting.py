"""Numbers as people read them, in the terminal and in the report."""

import datetime

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Returns a count, in full up to four digits: 792, 4,096, 45.2k, 671.0B."""
    if abs(number) >= 10_000:
        for unit, letter in _UNITS:
            if abs(number) >= unit:
                return f"{number / unit:.1f}{letter}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds, after days if need be: 0:02:31."""
    return str(datetime.timedelta(seconds=round(seconds)))
