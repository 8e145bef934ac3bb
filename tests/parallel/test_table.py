"""What a table of ticks says, row by row, whatever the layers are."""

import collections
import itertools

import pytest

from jmoe.parallel.pipeline.table import make_table
from jmoe.parallel.schedule.ticks import as_ticks
from tests.parallel.toy_pipeline import Cut, schedules_of

SIZES = [(1, 2), (2, 4), (2, 5), (4, 8), (4, 12)]


@pytest.mark.parametrize("schedule", list(schedules_of(SIZES)))
def test_a_table_leads_each_microbatch_through_all_layers_and_back(schedule):
    cut = Cut(schedule)
    groups = cut.groups(cut.weights, cut.state, 0)
    ticks = as_ticks(schedule)
    follower = Follower(cut, make_table(ticks, groups))
    for tick in range(ticks.count):
        follower.follow(tick)
    layers = cut.span["wide"][1]
    wanted = set(itertools.product(range(schedule.num_microbatches), range(layers)))
    for passed in (follower.forward, follower.backward, follower.weight):
        assert passed == collections.Counter(wanted)


class Follower:
    """Does what a table says with notes of what was done, in place of arrays.

    A note is of a microbatch and the layers that it has been through, or, on its way
    back, has still to go through.
    """

    def __init__(self, cut, row):
        self.cut, self.row = cut, row
        self.num_layers = cut.span["wide"][1]
        self.inbox = {"f": {}, "b": {}}  # by rank and slot, as are the others
        self.kept, self.owed = {}, {}
        self.forward, self.backward, self.weight = (
            collections.Counter() for _ in range(3)
        )

    def follow(self, tick):
        made = {"f": {}, "b": {}}
        for rank in range(self.cut.schedule.num_ranks):
            at = (tick, rank)
            if self.layers("f", at):
                made["f"][rank] = self.do_f(at)
            if self.layers("b", at):
                made["b"][rank] = self.do_b(at)
            if self.layers("w", at):
                self.do_w(at)
            self.check_pairs(at)
        for kind, boxes in (("f", self.row.for_f), ("b", self.row.for_b)):
            for way, slots in boxes.items():
                for rank, slot in enumerate(slots[tick]):
                    sender = (rank - way) % self.cut.schedule.num_ranks
                    self.inbox[kind][rank, slot] = made[kind].get(sender)

    def do_f(self, at):
        _, rank = at
        microbatch, layers = self.field("f", "microbatch", at), self.layers("f", at)
        if self.field("f", "first", at):
            note = (microbatch, ())
        else:
            note = self.inbox["f"][rank, self.field("f", "source", at)]
        assert note == (microbatch, tuple(range(layers[0])))
        self.kept[rank, self.field("f", "kept", at)] = (microbatch, layers)
        self.forward.update((microbatch, layer) for layer in layers)
        return microbatch, (*note[1], *layers)

    def do_b(self, at):
        _, rank = at
        microbatch, layers = self.field("b", "microbatch", at), self.layers("b", at)
        inbox = self.inbox["f" if self.field("b", "last", at) else "b"]
        note = inbox[rank, self.field("b", "source", at)]
        assert note == (microbatch, tuple(range(layers[-1] + 1)))
        assert self.kept[rank, self.field("b", "kept", at)] == (microbatch, layers)
        assert self.field("b", "first", at) == (layers[0] == 0)
        assert self.field("b", "last", at) == (layers[-1] == self.num_layers - 1)
        self.owed[rank, self.field("b", "owed", at)] = (microbatch, layers)
        self.backward.update((microbatch, layer) for layer in layers)
        return microbatch, note[1][: -len(layers)]

    def do_w(self, at):
        _, rank = at
        microbatch, layers = self.field("w", "microbatch", at), self.layers("w", at)
        assert self.kept[rank, self.field("w", "kept", at)] == (microbatch, layers)
        assert self.owed[rank, self.field("w", "owed", at)] == (microbatch, layers)
        self.weight.update((microbatch, layer) for layer in layers)

    def check_pairs(self, at):
        f, b, w = (len(self.layers(kind, at)) for kind in "fbw")
        both = min(self.row.f.count_G[at][-1], self.row.b.count_G[at][-1])
        assert self.row.pairs[at] == (both if f and b and w else 0)

    def field(self, kind, name, at):
        return int(getattr(getattr(self.row, kind), name)[at])

    def layers(self, kind, at):
        """Returns the layers of the whole model that an instruction goes through."""
        step, found = getattr(self.row, kind), []
        for g, (name, (begin, _)) in enumerate(self.cut.span.items()):
            index, _, _ = self.cut.rows[name]
            start, count = step.start_G[at][g], step.count_G[at][g]
            found += [int(begin + i) for i in index[at[1]][start : start + count]]
        return tuple(found)
