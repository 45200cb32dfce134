import json

import pytest
from launches import launch
from sharded_cases import EMPTY, all_cases

pytestmark = pytest.mark.slow

# Processes add up in another order. In float64 that leaves the formulas alone; float32 sums of 33 000 elements round
TOLERANCES = {"float64": 1e-12, "float32": 3e-6, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found."""
    directory = tmp_path_factory.mktemp("sharded")
    launch("sharded_run.py", directory)
    return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", all_cases())
def test_cut_weights_count_as_the_whole_weights_they_are(results, name):
    tolerance = TOLERANCES[name.rpartition("-")[2]]
    for result in results:
        assert "error" not in result[name], result[name]["error"]
        assert len(result[name]["differences"]) > 2
        far = {key: value for key, value in result[name]["differences"].items() if not value <= tolerance}
        assert far == {}
        assert result[name]["disagreements"] == []


@pytest.mark.parametrize("layout", EMPTY)
def test_some_cuts_leave_the_second_process_nothing(results, layout):
    assert [result["empty"][layout] for result in results] == [[], EMPTY[layout]]
