"""What is said of a pipeline's program, where its text is written by hand."""

import pytest

from jmoe.plan import copies, pipelined, traffic

MESH = {"data": 1, "pipe": 2, "expert": 2, "tensor": 1}

# A tick hands over along `pipe`; its loop over layers exchanges along `expert`.
TEXT = """
HloModule step, is_scheduled=true

%layers (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %f = ((bf16[8,4]), bf16[8,4]{1,0}) all-to-all-start(%x), EXPERT, AT_FORWARD
  %b = ((bf16[8,4]), bf16[8,4]{1,0}) all-to-all-start(%x), EXPERT, AT_BACKWARD
  %of-b = bf16[8,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, AT_BACKWARD
  %f-done = bf16[8,4]{1,0} all-to-all-done(%f)
  %of-w = bf16[8,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, AT_WEIGHT
  %b-done = bf16[8,4]{1,0} all-to-all-done(%b)
  %late = ((bf16[2,4]), bf16[2,4]{1,0}) all-to-all-start(%x2), EXPERT, AT_BACKWARD
  %of-f = bf16[8,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, AT_FORWARD
  %late-done = bf16[2,4]{1,0} all-to-all-done(%late)
  %x2 = bf16[2,4]{1,0} slice(%x), slice={[0:2], [0:4]}
  %same = bf16[8,4]{1,0} copy(%x)
  ROOT %out = (s32[], bf16[8,4]{1,0}) tuple(%i, %same)
}

%tick (q: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %q = (s32[], bf16[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %y = bf16[8,4]{1,0} get-tuple-element(%q), index=1
  %loop = (s32[], bf16[8,4]{1,0}) while(%q), condition=%cond, body=%layers
  %next = bf16[8,4]{1,0} collective-permute(%y), source_target_pairs={{0,2},{2,0}}
  ROOT %out.1 = (s32[], bf16[8,4]{1,0}) tuple(%j, %next)
}

ENTRY %main (x: bf16[64,64]) -> bf16[64,64] {
  %start = bf16[64,64]{1,0} parameter(0)
  %own = bf16[64,64]{1,0} copy(%start)
  %ticks = (s32[], bf16[8,4]{1,0}) while(%own), condition=%cond, body=%tick, KNOWN
  ROOT %end = bf16[64,64]{1,0} copy(%own)
}
"""
WORDS = {
    "EXPERT": "replica_groups={{0,1},{2,3}}",
    "KNOWN": 'backend_config={"known_trip_count":{"n":"7"}}',
} | {
    f"AT_{name.upper()}": f'metadata={{op_name="jit(f)/while/body/{name}/product"}}'
    for name in ("forward", "backward", "weight")
}


def written(text=TEXT):
    for word, meaning in WORDS.items():
        text = text.replace(word, meaning)
    return text


@pytest.fixture(scope="module")
def found():
    return traffic.collectives(written(), MESH)


def test_scopes_say_which_pass_a_collective_and_a_product_are_of(found):
    seen = [(c.phase, c.spans) for c in found if c.kind == "all-to-all"]
    assert seen == [
        ("forward", {"backward": 1}),
        ("backward", {"backward": 1, "weight": 1}),
        ("backward", {"forward": 1}),
    ]


def test_a_collective_is_hidden_by_the_other_microbatch_and_not_by_its_own(found):
    assert [pipelined.crosses(c) for c in found] == [False, True, False, True]
    shares = {row.phase: row.crossing for row in pipelined.overlaps(found)}
    assert shares == {"forward": 1, "backward": 2 / (8 + 2)}


def test_the_overlapped_loop_is_where_both_directions_are(found):
    assert {c.kind for c in pipelined.overlapped(found)} == {"all-to-all"}
    alone = [c for c in found if c.phase != "backward"]
    assert pipelined.overlapped(alone) == []


def test_only_loops_of_known_length_are_run_by_all(found):
    assert [c.optional for c in found] == [False, True, True, True]
    assert [c.times for c in found] == [7] * 4


def test_ranks_that_may_skip_a_collective_are_told_from_those_that_cannot(found):
    assert pipelined.waiting(found) == []
    unknown = traffic.collectives(written(TEXT.replace(", KNOWN", "")), MESH)
    (waiting,) = pipelined.waiting(unknown)
    assert waiting.kind == "collective-permute"


def test_copies_count_in_loops_only():
    assert copies.largest_in_loops(written()) == 2 * 8 * 4
    none = TEXT.replace("copy(%x)", "negate(%x)")
    assert copies.largest_in_loops(written(none)) == 0


def test_a_fusion_that_only_moves_an_array_copies_it():
    fused = TEXT.replace("copy(%x)", "fusion(%x), kind=kLoop, calls=%inner")
    inner = """
%inner (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  ROOT %moved = bf16[8,4]{1,0} OPCODE(%a)
}
"""
    for opcode, size in (("copy", 64), ("negate", 0)):
        text = inner.replace("OPCODE", opcode) + fused
        assert copies.largest_in_loops(written(text)) == size
