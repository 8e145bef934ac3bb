"""What DeepSeek published of V3's checkpoint, to hold a plan against.

The rules are written from its config.json and the description of its weights, in
numbers, and know nothing of `jmoe.export.names`. `BYTES` is the size of its 163 files;
what the plan's tensors leave of it is their headers.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from jmoe.export.layout import CODES, FileEntry

TENSORS = 91_991  # in model.safetensors.index.json
BYTES = 688_586_727_753
HEADER_BYTES = 150  # of one tensor, at most: its name, type, shape and offsets


class Rule(NamedTuple):
    """Tensors of one kind; with `is_fp8` each has block scales beside it."""

    pattern: str
    shape: tuple[int, ...]
    count: int
    is_fp8: bool = False


_ANY = r"model\.layers\.(?:\d|[1-5]\d|6[01])\."
_DENSE = r"model\.layers\.[0-2]\.mlp\."
_MOE = r"model\.layers\.(?:[3-9]|[1-5]\d|6[01])\.mlp\."
_EXPERT = _MOE + r"experts\.(?:1?\d?\d|2[0-4]\d|25[0-5])\."
_MTP = r"model\.layers\.61\."

RULES = (
    Rule(r"model\.embed_tokens\.weight", (129_280, 7168), 1),
    Rule(r"model\.norm\.weight", (7168,), 1),
    Rule(r"lm_head\.weight", (129_280, 7168), 1),
    Rule(_ANY + r"(?:input|post_attention)_layernorm\.weight", (7168,), 124),
    Rule(_ANY + r"self_attn\.q_a_proj\.weight", (1536, 7168), 62, True),
    Rule(_ANY + r"self_attn\.q_a_layernorm\.weight", (1536,), 62),
    Rule(_ANY + r"self_attn\.q_b_proj\.weight", (24_576, 1536), 62, True),
    Rule(_ANY + r"self_attn\.kv_a_proj_with_mqa\.weight", (576, 7168), 62, True),
    Rule(_ANY + r"self_attn\.kv_a_layernorm\.weight", (512,), 62),
    Rule(_ANY + r"self_attn\.kv_b_proj\.weight", (32_768, 512), 62, True),
    Rule(_ANY + r"self_attn\.o_proj\.weight", (7168, 16_384), 62, True),
    Rule(_DENSE + r"(?:gate|up)_proj\.weight", (18_432, 7168), 6, True),
    Rule(_DENSE + r"down_proj\.weight", (7168, 18_432), 3, True),
    Rule(_MOE + r"shared_experts\.(?:gate|up)_proj\.weight", (2048, 7168), 118, True),
    Rule(_MOE + r"shared_experts\.down_proj\.weight", (7168, 2048), 59, True),
    Rule(_MOE + r"gate\.weight", (256, 7168), 59),
    Rule(_MOE + r"gate\.e_score_correction_bias", (256,), 59),
    Rule(_EXPERT + r"(?:gate|up)_proj\.weight", (2048, 7168), 30_208, True),
    Rule(_EXPERT + r"down_proj\.weight", (7168, 2048), 15_104, True),
    Rule(_MTP + r"(?:enorm|hnorm|shared_head\.norm)\.weight", (7168,), 3),
    Rule(_MTP + r"eh_proj\.weight", (7168, 14_336), 1),
    Rule(_MTP + r"embed_tokens\.weight", (129_280, 7168), 1),
    Rule(_MTP + r"shared_head\.head\.weight", (129_280, 7168), 1),
)


def differences(entries: Iterable[FileEntry]) -> list[str]:
    """Returns where a plan differs from V3's published checkpoint; empty if nowhere."""
    entries = list(entries)
    expected = dict(_expected())
    any_of = re.compile("|".join(f"(?P<r{n}>{p})" for n, p in enumerate(expected)))
    patterns = list(expected)
    counts: Counter[str] = Counter()
    problems = []
    for entry in entries:
        match = any_of.fullmatch(entry.name)
        if match is None or match.lastgroup is None:
            problems.append(f"{entry.name} isn't published")
            continue
        pattern = patterns[int(match.lastgroup[1:])]
        counts[pattern] += 1
        code, shape, _ = expected[pattern]
        if (CODES[entry.dtype], entry.shape) != (code, shape):
            problems.append(
                f"{entry.name} is {CODES[entry.dtype]} {list(entry.shape)}, not {code} "
                f"{list(shape)}"
            )
    problems += [
        f"{pattern} has {counts[pattern]} tensors, not {count}"
        for pattern, (_, _, count) in expected.items()
        if counts[pattern] != count
    ]
    if len({entry.name for entry in entries}) != TENSORS:
        problems.append(f"{len(entries)} tensors, not {TENSORS}")
    headers = BYTES - sum(entry.nbytes for entry in entries)
    if not 0 < headers < HEADER_BYTES * TENSORS:
        problems.append(f"{headers} bytes would be left for headers")
    return problems


def _expected():
    """Yields for each pattern type, shape and count, with the block scales."""
    for rule in RULES:
        wide = "F32" if rule.pattern.endswith("bias") else "BF16"
        code = "F8_E4M3" if rule.is_fp8 else wide
        yield rule.pattern, (code, rule.shape, rule.count)
        if rule.is_fp8:
            blocks = tuple(math.ceil(size / 128) for size in rule.shape)
            yield rule.pattern + "_scale_inv", ("F32", blocks, rule.count)
