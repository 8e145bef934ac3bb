"""What may happen to a checkpoint that nobody wrote: bytes that flip, files that go.

Each kind in KINDS harms the newer of two checkpoints, as Checkpoints describes, and
says what it did. The choice is that of a random generator, so that a seed repeats it.

FORGED are changes after which the manifest's own sum was made right again. Nothing but
the arrays themselves can then tell; sums are against accidents.
"""

import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from jmoe.checkpoint import manifest


class Checkpoints(NamedTuple):
    """Directories of two checkpoints, whose names are their steps."""

    newer: pathlib.Path
    older: pathlib.Path


Harm = Callable[[Checkpoints, random.Random], str]


def files(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip_a_bit(found: Checkpoints, chance: random.Random) -> str:
    return _flip(chance.choice(files(found.newer)), chance)


def flip_a_bit_of_the_largest(found: Checkpoints, chance: random.Random) -> str:
    return _flip(max(files(found.newer), key=lambda path: path.stat().st_size), chance)


def flip_a_bit_of_the_manifest(found: Checkpoints, chance: random.Random) -> str:
    return _flip(found.newer / manifest.FILE_NAME, chance)


def cut_a_file_short(found: Checkpoints, chance: random.Random) -> str:
    path = chance.choice(files(found.newer))
    size = chance.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size} bytes"


def lengthen_a_file(found: Checkpoints, chance: random.Random) -> str:
    path = chance.choice(files(found.newer))
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 99)))
    return f"bytes added to {path.name}"


def zero_a_file(found: Checkpoints, chance: random.Random) -> str:
    path = chance.choice(files(found.newer))
    path.write_bytes(bytes(path.stat().st_size))
    return f"{path.name} filled with zeros"


def zero_a_block(found: Checkpoints, chance: random.Random) -> str:
    path = max(files(found.newer), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    start = chance.randrange(0, len(data), 512)
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    path.write_bytes(data)
    return f"512 bytes of {path.name} zeroed at {start}"


def remove_a_file(found: Checkpoints, chance: random.Random) -> str:
    path = chance.choice(files(found.newer))
    path.unlink()
    return f"{path.name} removed"


def remove_a_directory(found: Checkpoints, chance: random.Random) -> str:
    below = sorted(path for path in found.newer.rglob("*") if path.is_dir())
    path = chance.choice(below)
    shutil.rmtree(path)
    return f"{path.name} removed with all below"


def remove_everything(found: Checkpoints, chance: random.Random) -> str:
    for path in found.newer.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return "emptied"


def swap_two_files(found: Checkpoints, chance: random.Random) -> str:
    one = chance.choice(files(found.newer))
    data = one.read_bytes()
    other = chance.choice([p for p in files(found.newer) if p.read_bytes() != data])
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return f"{one.name} and {other.name} swapped"


def take_a_file_of_the_older(found: Checkpoints, chance: random.Random) -> str:
    """Under its own name where both have it, or else that nearest in size."""
    by_path = {path: _counterpart(path, found) for path in files(found.newer)}
    differ = [p for p, other in by_path.items() if p.read_bytes() != other.read_bytes()]
    path = chance.choice(differ)
    shutil.copyfile(by_path[path], path)
    return f"{path.name} is that of the older"


def _counterpart(path: pathlib.Path, found: Checkpoints) -> pathlib.Path:
    same, size = found.older / path.relative_to(found.newer), path.stat().st_size
    if same.exists():
        return same
    return min(files(found.older), key=lambda p: abs(p.stat().st_size - size))


def add_a_file(found: Checkpoints, chance: random.Random) -> str:
    directories = [found.newer, *(p for p in found.newer.rglob("*") if p.is_dir())]
    path = chance.choice(sorted(directories)) / f"{chance.getrandbits(32):x}"
    path.write_bytes(chance.randbytes(99))
    return f"{path.name} added to {path.parent.name}"


def edit_the_manifest(found: Checkpoints, chance: random.Random) -> str:
    """Any of its values, its sum among them; what the sum should be isn't made so."""
    return _edit(found.newer, chance)


def edit_the_position(found: Checkpoints, chance: random.Random) -> str:
    return _edit(found.newer, chance, "position")


def copy_the_older(found: Checkpoints, chance: random.Random) -> str:
    shutil.rmtree(found.newer)
    shutil.copytree(found.older, found.newer)
    return f"a copy of {found.older.name}"


def copy_the_older_and_edit_its_step(found: Checkpoints, chance: random.Random) -> str:
    copy_the_older(found, chance)
    _change(found.newer, ["step"], int(found.newer.name))
    return f"a copy of {found.older.name} whose step is edited"


def name_it_newer(found: Checkpoints, chance: random.Random) -> str:
    step = int(found.newer.name) + chance.randint(1, 99)
    found.newer.rename(found.newer.with_name(str(step)))
    return f"renamed to {step}"


KINDS: dict[str, Harm] = {
    harm.__name__.replace("_", " "): harm
    for harm in (
        flip_a_bit,
        flip_a_bit_of_the_largest,
        flip_a_bit_of_the_manifest,
        cut_a_file_short,
        lengthen_a_file,
        zero_a_file,
        zero_a_block,
        remove_a_file,
        remove_a_directory,
        remove_everything,
        swap_two_files,
        take_a_file_of_the_older,
        add_a_file,
        edit_the_manifest,
        edit_the_position,
        copy_the_older,
        copy_the_older_and_edit_its_step,
        name_it_newer,
    )
}


def forge_the_position(found: Checkpoints, chance: random.Random) -> str:
    said = _edit(found.newer, chance, "position")
    _seal(found.newer)
    return f"{said}, and sealed"


def forge_the_older_as_newer(found: Checkpoints, chance: random.Random) -> str:
    said = copy_the_older_and_edit_its_step(found, chance)
    _seal(found.newer)
    return f"{said}, and sealed"


FORGED: dict[str, Harm] = {
    harm.__name__.replace("_", " "): harm
    for harm in (forge_the_position, forge_the_older_as_newer)
}


def _flip(path: pathlib.Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = chance.randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)
    return f"bit {at} of {path.name} flipped"


def _edit(directory: pathlib.Path, chance: random.Random, *above: str) -> str:
    """Another value for one of the manifest's, at any depth below `above`."""
    keys: list[Any] = list(above)
    value: Any = json.loads((directory / manifest.FILE_NAME).read_text())
    for key in keys:
        value = value[key]
    while isinstance(value, dict | list) and value:
        below = value if isinstance(value, dict) else range(len(value))
        keys.append(chance.choice(list(below)))
        value = value[keys[-1]]
    if isinstance(value, bool) or not isinstance(value, int):
        new = f"{value}{chance.randrange(10)}" if isinstance(value, str) else 7
    else:
        new = value + chance.choice([-4, -1, 1, 4, 400])
    _change(directory, keys, new)
    return f"{'.'.join(map(str, keys))}: {new!r} instead of {value!r}"


def _change(directory: pathlib.Path, keys: list[Any], new: Any) -> None:
    path = directory / manifest.FILE_NAME
    whole = json.loads(path.read_text())
    value = whole
    for key in keys[:-1]:
        value = value[key]
    value[keys[-1]] = new
    path.write_text(json.dumps(whole, indent=1))


def _seal(directory: pathlib.Path) -> None:
    """Makes the manifest's sum right for what it says now."""
    path = directory / manifest.FILE_NAME
    said = json.loads(path.read_text())
    del said["crc"]
    _change(directory, ["crc"], manifest._own_crc(said))
