import sys
from pathlib import Path

import pytest

# The tests here train with the tiny models and arguments of the training tests
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory):
    """Runs cases of `trainer_run.py`, by name, in one launch with an accelerate config; returns their directory."""
    from launches import launch
    from trainer_cases import save_models, write_cases

    def run(cases, config):
        directory = tmp_path_factory.mktemp("cases")
        save_models(directory / "models")
        write_cases(directory, cases)
        launch("trainer_run.py", directory, config=config, processes=1 if config == "cpu" else 2)
        return directory

    return run
