"""What the decoder does while CUDA graphs are recorded, without a GPU: see capture_graphs.py."""

import pytest
from ahead import FORMS, compiled_by


@pytest.fixture(scope="module", params=FORMS)
def reports(request):
    """The lines of a process that pretends to have a GPU; the full form compiles every kernel."""
    return compiled_by("capture_graphs.py", request.param)


def models(reports):
    return [line for line in reports if "graphs" in line]


def test_nothing_is_compiled_copied_or_read_back_while_a_graph_is_recorded(reports):
    assert {line["label"]: line["faults"] for line in models(reports) if line["faults"]} == {}


def test_every_model_has_graphs_and_every_graph_has_kernels(reports):
    for line in models(reports):
        assert len(line["graphs"]) >= 5, line["label"]
        assert min(line["graphs"]) >= 1, line["label"]


def test_the_second_round_compiles_nothing(reports):
    assert {line["label"] for line in models(reports) if line["new_in_second_round"]} == set()


def test_what_must_not_be_in_a_graph_is_noticed(reports):
    faults = {line["label"]: line["provoked"] for line in reports if "provoked" in line}
    assert faults.pop("nothing") == []
    assert len(faults) == 8
    assert all(len(found) == 1 for found in faults.values()), faults
