"""A demo market that all tests of the room read, a place for each to work in, and one whole run."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from qlib.workflow import R
from qlib.workflow.recorder import Recorder
from tiny import finetune, make_dataset, make_model, use_market

from kronos_qlib import KLineDataset, KronosModel
from kronos_qlib.data.demo_market import write_demo_market


@pytest.fixture(scope="session")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_market(tmp_path_factory.mktemp("demo") / "market", instruments=8, days=160, seed=3)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Path:
    """The working directory, with the recorders' mlflow.db and mlruns/ in it."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copy(database, folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an empty MLflow database."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(database, tmp_path)
    return tmp_path


@pytest.fixture
def store(market: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    use_market(market)
    return market


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Qlib's loggers, which pass nothing on to the root, say from warnings up."""
    logger = logging.getLogger("qlib")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@dataclass(frozen=True)
class Run:
    """A model fitted and asked for scores under a recorder, as qrun does."""

    folder: Path
    dataset: KLineDataset
    model: KronosModel
    scores: pd.Series
    recorder: Recorder


@pytest.fixture(scope="session")
def run(market: Path, workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        use_market(market)
        folder, dataset = tmp_path_factory.mktemp("run"), make_dataset()
        model = make_model(finetune=finetune(folder))
        with R.start(experiment_name="run"):
            model.fit(dataset)
            scores = model.predict(dataset)
            recorder = R.get_recorder()
        return Run(folder, dataset, model, scores, recorder)
