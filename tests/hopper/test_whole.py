"""Whole models: do they fit, and does compiling them stay within what is allowed."""

import dataclasses
import json

import pytest

from experiments.benchmarks import hopper
from jmoe.plan import programs, summary

pytestmark = pytest.mark.hopper

GIB = 2**30


@pytest.fixture(scope="module")
def v2_lite():
    return summary.apart(summary.compile_run, programs.v2_lite(nodes=2))


@pytest.fixture(scope="module")
def v3():
    """`seconds` as on cores of its own, where other tests have none: the CPU's time."""
    found = summary.apart(summary.compile_run, programs.v3_2048())
    return dataclasses.replace(found, seconds=found.cpu_seconds)


@pytest.fixture(scope="module")
def muon():
    return summary.apart(summary.compile_optimizer, programs.v2_lite_muon())


def test_v2_lite_fits_on_16_h20s(v2_lite):
    assert v2_lite.fits
    assert v2_lite.memory.temporaries > 0


def test_v2_lites_tokens_go_once_to_each_device_that_they_need(v2_lite):
    assert 1 <= summary.dispatch_ratio(v2_lite) <= 1.1


def test_v2_lites_backward_exchanges_have_products_meanwhile(v2_lite):
    exchanges = [
        c
        for c in v2_lite.collectives
        if (c.phase, c.kind) == ("backward", "all-to-all")
    ]
    layers = v2_lite.run.model.num_moe_layers * programs.MICROBATCHES
    assert {c.times for c in exchanges} == {layers}
    assert summary.hidden(exchanges) >= 0.5


def test_v3_compiles_for_2048_h20s_in_3_minutes_and_4_gib_and_fits(v3):
    assert v3.run.mesh.num_devices == 2048
    assert v3.seconds < 180
    assert v3.host_bytes < 4 * GIB
    assert v3.fits


@pytest.mark.parametrize("model", ["v2_lite", "v3"])
def test_no_pass_gathers_weights_or_other_devices_tokens(model, request):
    assert summary.batch_gathers(request.getfixturevalue(model)) == []


def test_muon_makes_matrices_orthogonal_in_2_gib_and_gathers_nothing(muon):
    assert muon.memory.temporaries <= 2 * GIB
    # Updates, weights and state take the place of gradients, weights and state.
    assert muon.memory.outputs - muon.memory.aliased < 2**20
    swapped = [c for c in muon.collectives if c.moved_bytes > summary.SMALL]
    assert {c.kind for c in swapped} == {"all-to-all"}
    # Experts, which are most of it, are swapped over data alone.
    sent = {c.axes: 0 for c in swapped}
    for c in swapped:
        sent[c.axes] += c.times * c.moved_bytes
    assert sent["data",] > sent["data", "expert"] > 0


def test_the_report_has_what_is_asked_of_all_and_says_that_it_is_met(v2_lite, v3, muon):
    report = hopper.make_report([v2_lite, v3], {1: 400, 2: 200, 4: 100}, muon)
    asked = [figure for figure in report.figures if figure.asked]
    assert len(asked) == 17
    assert all(figure.met for figure in asked)
    json.dumps(report.to_dict())
