import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from kronos_qlib.cli import main
from kronos_qlib.data.demo_market import is_synthetic


def test_demo_data_writes_the_market_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    market = tmp_path / "runs" / "market"
    options = ["--instruments", "5", "--days", "70", "--signal", "0", "--seed", "4"]
    assert main(["demo-data", str(market), *options]) == 0
    assert is_synthetic(market)
    assert (
        '{"instruments": 5, "days": 70, "signal": 0.0, "seed": 4, "freq": "day", "market": "stocks"}'
        in (market / "SYNTHETIC.txt").read_text()
    )
    told = capsys.readouterr().out
    assert "synthetic" in told
    assert str(market) in told


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--signal", "7"], "signal must be a number from 0"),
        (["--days", "3"], "days must be a whole number from 60"),
    ],
)
def test_bad_value_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    assert main(["demo-data", str(tmp_path / "market"), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("kronos-qlib demo-data: error: ")
    assert reason in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folder_of_another_kind_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo-data", str(tmp_path)]) == 2
    assert "not a demo market" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_compare_without_a_database_says_so_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "any", "--uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 2
    assert f"no MLflow database {tmp_path}/mlflow.db" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["demo-data"], ["compare"], ["finetune"], ["demo-data", "x", "--days", "many"]]
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: kronos-qlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ([], ["demo-data", "compare", "qrun workflows/lightgbm_demo.yaml"]),
        (["demo-data"], ["SYNTHETIC.txt", "--signal", "default: 0.05", "examples:"]),
        (["tune"], ["task.model.kwargs.learning_rate: {float", "kronos_qlib.trial", "examples:"]),
        (["ledger"], ["ledger update", "ledger show", "before the next session opened", "examples:"]),
        (["ledger", "show"], ["its power is said", "KRONOS_LEDGER", "examples:"]),
        (["roll"], ["NAME_rolling_tasks", "--from {scratch,previous}", "embargo", "examples:"]),
        (["compare"], ["comparison.csv", "excess_return.png", "0.05 is 5 %", "examples:"]),
    ],
)
def test_help_teaches(command: list[str], taught: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(words in told for words in taught)


def test_help_needs_no_heavy_import_and_the_module_runs() -> None:
    script = (
        "import runpy, sys; sys.argv = ['kronos-qlib', '--help']\n"
        "try: runpy.run_module('kronos_qlib', run_name='__main__')\n"
        "except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'qlib', 'pandas', 'numpy', 'mlflow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("usage: kronos-qlib")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("kronos-qlib ")


def write_notifier(folder: Path) -> str:
    program = folder / "notify.py"
    program.write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")
    return f"{sys.executable} {program} {folder / 'told.txt'}"


def test_commands_run_in_order_up_to_the_first_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, told = tmp_path / "logs" / "evening.log", tmp_path / "told.txt"
    before = ["--log", str(log), "--lock", str(tmp_path / "lock"), "--notify", write_notifier(tmp_path)]
    made = ["demo-data", str(tmp_path / "market"), "--instruments", "5", "--days", "70"]
    assert main([*before, *made, "--then", *made]) == 0
    assert not told.exists()
    wrong = ["demo-data", str(tmp_path / "other"), "--days", "3"]
    assert main([*before, *wrong, "--then", "demo-data", str(tmp_path / "third")]) == 2
    assert not (tmp_path / "other").exists() and not (tmp_path / "third").exists()
    lines = log.read_text().splitlines()
    assert [line.split()[1:4] for line in lines] == [["demo-data", "status", number] for number in "002"]
    assert lines[-1].endswith("days must be a whole number from 60 to 10000; it is 3")
    assert told.read_text() == lines[-1]
    capsys.readouterr()


def test_a_mistake_in_a_later_command_is_said_before_the_first_runs(tmp_path: Path) -> None:
    before = ["--log", str(tmp_path / "log"), "--notify", write_notifier(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*before, "demo-data", str(tmp_path / "market"), "--then", "compare"])
    assert ended.value.code == 2
    assert not (tmp_path / "market").exists()
    assert "compare status 2" in (tmp_path / "log").read_text() and "compare" in (tmp_path / "told.txt").read_text()


def test_of_a_failure_is_told_though_the_log_cannot_be_written(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    before = ["--log", str(tmp_path / "file" / "log"), "--notify", write_notifier(tmp_path)]
    assert main([*before, "demo-data", str(tmp_path / "market"), "--days", "3"]) == 2
    assert "days must be" in (tmp_path / "told.txt").read_text() and "--log: " in capsys.readouterr().err


def test_a_run_that_is_terminated_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd ends one."""
    monkeypatch.setattr("kronos_qlib.cli.demo_data.run", lambda options: os.kill(os.getpid(), signal.SIGTERM))
    before = ["--log", str(tmp_path / "log"), "--notify", write_notifier(tmp_path)]
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray, in another test, leaves its own
    try:
        with pytest.raises(SystemExit) as ended:
            main([*before, "demo-data", str(tmp_path / "market")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "demo-data status 143" in (tmp_path / "told.txt").read_text()


def test_two_runs_do_not_hold_a_lock_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock, log = tmp_path / "lock", tmp_path / "log"
    arguments = ["--lock", str(lock), "--log", str(log), "demo-data", str(tmp_path / "market"), "--days", "70"]
    with FileLock(lock):
        assert main(arguments) == 4
    assert f"another run holds {lock}; nothing was done" in capsys.readouterr().err
    assert not (tmp_path / "market").exists() and "demo-data status 4" in log.read_text()
    assert main(arguments) == 0
