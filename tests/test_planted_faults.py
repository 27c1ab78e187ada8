"""The tables of planted faults fit the code, and the page about them has their count."""

import plant_faults
import pytest
import small

FAULTS = plant_faults.faults()


def test_every_fault_fits_its_file_and_names_tests_that_exist():
    assert [text for fault in FAULTS if (text := plant_faults.problem(fault))] == []


def test_no_fault_is_there_twice():
    assert len(set(FAULTS)) == len(FAULTS)


def test_every_room_has_faults():
    faulty = {fault.path for fault in FAULTS}
    assert len(FAULTS) >= 150
    for room in ("mistral/engine", "mistral/checkpoints", "mistral/chat", "mistral/evaluation"):
        assert any(path.startswith(room) for path in faulty), room
    rooms = {path.parent for path in (small.ROOT / "kernels").rglob("*.py")}
    rooms |= {path.parent for path in (small.ROOT / "mistral").rglob("*.py")}
    rooms -= {small.ROOT / "mistral/demo"}  # a file of weights alone
    found = {(small.ROOT / path).parent for path in faulty}
    assert rooms <= found


def test_the_page_has_the_count_of_the_tables():
    page = plant_faults.PAGE.read_text()
    assert page == plant_faults.page(FAULTS)


def test_parts_make_up_the_whole():
    parts = [plant_faults._part(FAULTS, f"{k}/3") for k in (1, 2, 3)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, FAULTS))
    for part in ("0/3", "4/3"):
        with pytest.raises(ValueError, match="1 <= k <= n"):
            plant_faults._part(FAULTS, part)


def test_a_fault_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "tests.py").write_text("def test_a(): pass")
    (tmp_path / "code.py").write_text("a = 1\nb = 1\nc = 2\n")
    known = dict(room="r", path="code.py", new="3", tests="tests.py::test_a", reason="")
    for changes, message in (
        (dict(old="= 2"), None),
        (dict(old="= 1"), "occurs 2 times"),
        (dict(old="= 9"), "occurs 0 times"),
        (dict(old="= 2", new="= 2"), "is the old text"),
        (dict(old="= 2", path="gone.py"), "gone.py does not exist"),
        (dict(old="= 2", tests="tests.py::test_b"), "test_b does not exist"),
    ):
        found = plant_faults.problem(plant_faults.Fault(**known | changes), tmp_path)
        assert (message or "None") in str(found)
