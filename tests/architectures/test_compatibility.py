"""The page shows the table of the recorded results, and these belong to the current tests."""

import json
import re

from .compatibility import COLUMNS, RESULTS, TABLE, Recorder
from .models import ARCHITECTURES

RECORDED = json.loads(RESULTS.read_text(encoding="utf-8"))


def test_the_page_shows_the_recorded_results() -> None:
    assert TABLE.parts()[1] == TABLE.render()


def test_every_architecture_and_every_test_is_recorded() -> None:
    tests = set(re.findall(r"^def (test_\w+)", (RESULTS.parent / "test_architectures.py").read_text(), re.MULTILINE))
    assert tests == {"test_covered", "test_probabilities_are_told_from_other_operands", *COLUMNS}
    assert list(RECORDED["architectures"]) == list(ARCHITECTURES)
    for name, architecture in ARCHITECTURES.items():
        passed = RECORDED["architectures"][name]["passed"]
        assert (
            passed["test_covered"]
            == passed["test_integer"]
            == passed["test_removed"]
            == list(architecture.implementations)
        ), name
        assert ("test_eager_and_sdpa_agree" in passed) is architecture.implementations_agree, name
        assert ("test_generates_with_a_cache" in passed) is architecture.generates, name
        assert {"test_trains", "test_saved_and_loaded", "test_packed", "test_frozen"} <= set(passed), name


class Report:
    """Stands for pytest's report of a test."""

    def __init__(self, case: str, passed: bool = True, when: str = "call"):
        self.nodeid = f"tests/architectures/test_architectures.py::test_covered[{case}]"
        self.passed, self.when = passed, when
        self.user_properties = [("linear", 2)]


def test_only_what_passed_is_recorded() -> None:
    recorder = Recorder()
    for report in (Report("XLM-R-eager"), Report("XLM-R-sdpa", passed=False), Report("T5-eager", when="setup")):
        recorder.pytest_runtest_logreport(report)
    assert recorder.rows == {"XLM-R": {"passed": {"test_covered": ["eager"]}, "linear": 2}}
