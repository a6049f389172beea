import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from ledgers import signal_set
from questions import QUESTION, Make, ask, wait_for
from starlette.testclient import TestClient

from kronos_qlib.data.calendar import sessions_after_bars
from kronos_qlib.forecast.predictor import possible_bars
from kronos_qlib.ingest.selection import read_instrument
from kronos_qlib.live.ledger import Ledger
from kronos_qlib.web import forecasts
from kronos_qlib.web.jobs import JobQueue, Task
from kronos_qlib.workflow.named_predictor import load_predictor

AT = "2018-07-02"


def events(text: str) -> list[tuple[str, dict]]:
    """The name and data of each server-sent event."""
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n", 1)
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_what_was_named_at_start_is_listed(client: TestClient, market: Path):
    health = client.get("/api/health").json()
    assert health["status"] == "ok" and health["uploads"] and not health["ledger"] and not health["runs"]
    (store,) = client.get("/api/stores").json()
    assert store["name"] == "market" and store["universes"] == ["all", "demo"] and store["first"] == "2018-01-02"
    (model,) = client.get("/api/models").json()
    assert model["name"] == "tiny"
    assert str(market.parent) not in json.dumps([store, model, health])


def test_instruments_are_searched(client: TestClient):
    found = client.get("/api/instruments", params={"source": "market", "query": "o0003"}).json()
    assert found == {"instruments": ["DEMO0003"], "total": 1}
    assert client.get("/api/instruments", params={"source": "market", "limit": 2}).json()["total"] == 13


def test_bars_end_at_the_date(client: TestClient):
    params = {"source": "market", "instrument": "DEMO0001", "at": AT, "count": 7}
    found = client.get("/api/bars", params=params).json()
    assert len(found["bars"]["time"]) == 7 and found["bars"]["time"][-1] <= AT < found["last"]


def test_a_forecast_is_that_of_the_predictor_to_the_last_bit(client: TestClient, market: Path, checkpoint: Path):
    answer = ask(client, at=AT, temperature=0.9, top_p=0.95, top_k=10, seed=3)["result"]
    bars = read_instrument(f"{market}:DEMO0001").bars.loc[:AT]
    times = sessions_after_bars(pd.DatetimeIndex(bars.index), 5)
    predictor, _ = load_predictor(str(checkpoint))
    bars = bars.iloc[-30:]
    paths = possible_bars(
        predictor.predict_paths(bars, bars.index, times, 5, T=0.9, top_p=0.95, top_k=10, sample_count=8, seed=3)
    )
    close = paths[..., 3]
    assert answer["paths"] == close.tolist()
    assert answer["quantiles"]["q05"] == np.quantile(close, 0.05, axis=0).tolist()
    assert answer["figures"]["prob_up"] == (close[:, -1] > bars["close"].iloc[-1]).mean()
    assert answer["times"] == [str(time.date()) for time in times]


def test_what_came_is_measured_beside_simple_forecasts(client: TestClient, market: Path):
    answer = ask(client, at=AT)["result"]
    came = read_instrument(f"{market}:DEMO0001").bars["close"].loc["2018-07-03":].iloc[:5]
    assert answer["came"]["close"] == came.tolist()
    figures = answer["figures"]
    assert figures["came"] == 5
    assert figures["error_last_value"] == pytest.approx((came / answer["last_close"] - 1).abs().mean())
    inside = (came >= answer["quantiles"]["q25"]) & (came <= answer["quantiles"]["q75"])
    assert figures["coverage_50"] == pytest.approx(inside.mean())
    assert {"crps", "crps_volatility", "coverage_90_volatility"} <= figures.keys()
    assert "error" not in ask(client)["result"]["figures"], "of the last bar nothing has come"


def test_the_snippet_repeats_the_forecast_to_the_digit(client: TestClient, capsys: pytest.CaptureFixture[str]):
    answer = ask(client, at="2018-06-29", samples=5)["result"]
    names: dict = {}
    exec(answer["snippet"], names)
    assert names["close"].T.to_numpy().tolist() == answer["paths"]
    assert "0.95" in capsys.readouterr().out


def test_a_snippet_names_no_folder_for_users_of_other_machines(make_client: Make, market: Path):
    answer = ask(make_client(paths_shown=False))["result"]
    assert str(market.parent) not in json.dumps(answer) and "'market:DEMO0001'" in answer["snippet"]


def test_the_same_question_is_answered_at_once(client: TestClient):
    first = ask(client)
    again = client.post("/api/forecasts", json=QUESTION).json()
    assert again["state"] == "done" and again["id"] != first["id"] and again["seconds"] == 0
    assert again["result"] == first["result"]
    assert client.post("/api/forecasts", json=QUESTION | {"seed": 1}).json()["state"] != "done"


def test_a_job_tells_its_progress_and_survives_a_reload(client: TestClient):
    job = client.post("/api/forecasts", json=QUESTION | {"horizon": 40}).json()
    told = events(client.get(f"/api/forecasts/{job['id']}/events").text)
    assert told[-1][0] == "result" and {name for name, _ in told[:-1]} <= {"queued", "progress"}
    assert [data["progress"] for _, data in told] == sorted(data["progress"] for _, data in told)
    assert client.get(f"/api/forecasts/{job['id']}").json()["result"] == told[-1][1]["result"]


def test_a_job_is_cancelled_while_it_samples_and_the_next_one_works(client: TestClient):
    long = client.post("/api/forecasts", json=QUESTION | {"samples": 1000, "horizon": 400}).json()
    waiting = client.post("/api/forecasts", json=QUESTION | {"samples": 999, "horizon": 400}).json()
    for job in (waiting, long):
        client.delete(f"/api/forecasts/{job['id']}")
        assert wait_for(client, "forecasts", job["id"])["state"] == "cancelled"
    assert ask(client)["state"] == "done"
    assert client.get("/api/health").json()["waiting"] == 0


def test_too_many_jobs_are_refused_with_the_time_to_ask_again(make_client: Make):
    client = make_client({"waiting": 1})
    jobs = [client.post("/api/forecasts", json=QUESTION | {"samples": 900, "seed": seed}) for seed in range(6)]
    refused = [answer for answer in jobs if answer.status_code == 429]
    assert refused and refused[0].headers["retry-after"] == "5"
    assert "wait already" in refused[0].json()["detail"]
    for answer in jobs:
        if answer.status_code == 202:
            client.delete(f"/api/forecasts/{answer.json()['id']}")
    assert ask(client)["state"] == "done"


def test_questions_that_wait_are_answered_in_one_call_and_equal_ones_once():
    calls, go = [], threading.Event()

    def work(payloads, report):
        calls.append(list(payloads))
        go.wait(10)
        return [{"answer": payload} for payload in payloads]

    queue = JobQueue("test", 20, 20)
    try:
        jobs = [queue.submit(Task("forecast", "first", ("alone",), "first", work, {}))]
        while not calls:
            pass
        jobs += [queue.submit(Task("forecast", name, ("group",), name, work, {})) for name in "abca"]
        jobs.append(queue.submit(Task("forecast", "z", ("other",), "z", work, {})))
        go.set()
        while any(job.state in ("queued", "running") for job in jobs):
            pass
        assert calls == [["first"], ["a", "b", "c"], ["z"]]
        assert [job.result["answer"] for job in jobs] == ["first", "a", "b", "c", "a", "z"]
    finally:
        queue.close()


def test_a_job_that_fails_says_so_in_a_sentence_and_the_thread_lives_on():
    def fail(payloads, report):
        raise KeyError("/secret/path")

    queue = JobQueue("test", 20, 20)
    try:
        job = queue.submit(Task("forecast", "x", None, "x", fail, {}))
        while job.state != "failed":
            pass
        assert "secret" not in job.problem["detail"]
        done = queue.submit(Task("forecast", "y", None, "y", lambda payloads, report: [{"fine": True}], {}))
        while done.state != "done":
            pass
    finally:
        queue.close()


def test_a_market_is_ranked(client: TestClient):
    asked = {"store": "market", "universe": "demo", "lookback": 20, "horizon": 5, "samples": 4, "at": AT}
    job = client.post("/api/market", json=asked).json()
    answer = wait_for(client, "market", job["id"])["result"]
    rows = answer["rows"]
    assert answer["date"] == AT and len(rows) + answer["left_out_total"] >= 9
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    one = ask(client, instrument=rows[0]["instrument"], at=AT, lookback=20, horizon=5, samples=4)["result"]
    scored = (np.array(one["paths"]) / one["last_close"]).mean() - 1
    assert rows[0]["score"] == pytest.approx(scored, rel=1e-3)


def test_a_watchlist_is_ranked(client: TestClient):
    asked = {"store": "market", "instruments": ["DEMO0002", "DEMO0001"], "lookback": 20, "horizon": 3, "samples": 2}
    job = client.post("/api/market", json=asked).json()
    rows = wait_for(client, "market", job["id"])["result"]["rows"]
    assert {row["instrument"] for row in rows} == {"DEMO0001", "DEMO0002"}
    assert client.post("/api/market", json=asked | {"instruments": ["NONE"]}).status_code == 404


def test_a_store_is_checked(client: TestClient):
    job = client.post("/api/checks", json={"source": "market"}).json()
    answer = wait_for(client, "checks", job["id"])["result"]
    assert answer["errors"] == 0 and "calendar" in {finding["subject"] for finding in answer["findings"]}


def test_an_upload_is_read_and_forecast(client: TestClient, market: Path):
    bars = read_instrument(f"{market}:DEMO0001").bars
    content = bars.rename_axis("date").to_csv()
    lines = content.splitlines()
    lines.insert(5, "2018-01-09,1,x,1,1,1")
    sent = client.post("/api/uploads", params={"name": "my <bars>.csv"}, content="\n".join(lines))
    assert sent.status_code == 201
    found = sent.json()
    assert found["name"] == "my <bars>.csv" and found["bars"] == len(bars) and found["rejected"] == 1
    assert found["examples"][0]["line"] == 6
    assert [entry["id"] for entry in client.get("/api/uploads").json()] == [found["id"]]
    assert found["instruments"] == ["MY-BARS"]
    mine = ask(client, source=found["id"], instrument=None)["result"]
    np.testing.assert_allclose(mine["paths"], ask(client)["result"]["paths"], 1e-12)  # the same bars in a store
    assert client.delete(f"/api/uploads/{found['id']}").status_code == 204
    assert client.post("/api/forecasts", json=QUESTION | {"source": found["id"]}).status_code == 404


def test_the_ledger_is_read(make_client: Make, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/ledger.db"
    ledger = Ledger(url)
    recorded = ledger.record(signal_set(), region="cn")
    client = make_client(ledger=url)
    found = client.get("/api/ledger").json()
    assert found["name"] == "ledger.db" and [entry["id"] for entry in found["sets"]] == [recorded.id]
    assert found["judgements"][0]["experiment"] == "kronos_csi300"
    rows = client.get(f"/api/ledger/{recorded.id}").json()["rows"]
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[0]["came"] is None
    assert client.get("/api/ledger/99").status_code == 404


def test_what_was_not_named_at_start_is_not_there(make_client: Make, tmp_path: Path):
    client = make_client(uploads=None)
    for path in ("/api/ledger", "/api/runs", "/api/uploads"):
        answer = client.get(path)
        assert answer.status_code == 404 and "start it with" in answer.json()["detail"]
    answer = make_client(runs=f"sqlite:///{tmp_path}/none.db").get("/api/runs")
    assert answer.status_code == 422 and str(tmp_path) not in answer.text
    with pytest.raises(ValueError, match="cannot be opened; its folder must be there"):
        make_client(ledger=f"sqlite:///{tmp_path}/none/ledger.db")


def test_a_long_forecast_shows_its_first_paths_while_it_draws_the_others(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kronos_qlib.web.forecasts.LONG", 1)
    job = client.post("/api/forecasts", json=QUESTION | {"samples": 200, "horizon": 20}).json()
    told = events(client.get(f"/api/forecasts/{job['id']}/events").text)
    result = told[-1][1]["result"]
    partial = [data["partial"] for _, data in told if data.get("partial")]
    assert len(partial) <= 1, "it is said once, if the others are not drawn sooner"
    prepared = forecasts.prepare(
        forecasts.ForecastQuestion(**QUESTION | {"samples": 200, "horizon": 20}),
        client.app.service.sources,
        client.app.service.networks,
        client.app.service.settings.limits,
    )
    shown: list = []
    forecasts.Forecasts(True).answer([prepared], lambda share, partial=None: shown.extend(partial or []))
    assert np.array(shown[0]["paths"]) == pytest.approx(np.array(result["paths"])[:16], rel=1e-5)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("samples", [6, 130])  # 130 are drawn in two parts
def test_a_forecast_is_the_same_to_the_last_bit_alone_and_among_others(market: Path, checkpoint: Path, samples: int):
    predictor, _ = load_predictor(str(checkpoint))
    frames = [read_instrument(f"{market}:DEMO000{number}").bars.iloc[-30:] for number in range(1, 4)]
    times = [sessions_after_bars(pd.DatetimeIndex(frame.index), 4) for frame in frames]
    options = {"sample_count": samples, "seed": 2, "top_p": 1.0}
    together = predictor.predict_paths_batch(frames, [frame.index for frame in frames], times, 4, **options)
    for frame, after, own in zip(frames, times, together):
        shares: list[float] = []
        for threads in (1, 3):
            with torch_threads(threads):
                alone = predictor.predict_paths_batch(
                    [frame], [frame.index], [after], 4, report_share=shares.append, **options
                )
            assert np.array_equal(alone[0], own)
        assert max(shares) == 1.0 and len(shares) == 2 * 4 * max(1, samples // 50)

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictor.predict_paths_batch(frames[:1], [frames[0].index], times[:1], 4, report_share=stop)


def test_a_ranking_is_made_anew_when_a_bar_of_the_store_has_changed(make_client: Make, market: Path, tmp_path: Path):
    store = shutil.copytree(market, tmp_path / "store")
    client = make_client(stores={"market": store})
    question = {"store": "market", "universe": "demo", "lookback": 20, "horizon": 3, "samples": 2}

    def rank() -> dict:
        return wait_for(client, "market", client.post("/api/market", json=question).json()["id"])

    first = rank()
    assert rank()["seconds"] == 0.0
    path = store / "features" / "demo0003" / "close.day.bin"
    values = np.fromfile(path, "<f4")
    values[1:] *= 2
    values.tofile(path)  # in place: no folder has changed
    second = rank()
    assert second["seconds"] > 0 and second["result"]["digest"] != first["result"]["digest"]


def test_later_bars_of_a_file_change_no_forecast(client: TestClient):
    days = pd.bdate_range("2024-01-02", periods=60)
    close = 10 + np.sin(np.arange(60))
    table = pd.DataFrame({"open": close, "high": close + 1, "low": close - 1, "close": close}, days.rename("date"))
    table["volume"], table["amount"] = 1000.0 + np.arange(60), 1e5
    whole = table.copy()
    whole.loc[days[55:], "amount"] = np.nan  # of later bars it is not known
    found = []
    for name, content in (("whole.csv", whole), ("cut.csv", table.iloc[:50])):
        upload = client.post(f"/api/uploads?name={name}", content=content.to_csv().encode()).json()
        found.append(ask(client, source=upload["id"], instrument=None, at=str(days[49].date()))["result"]["paths"])
    assert found[0] == found[1]


def test_a_midnight_is_a_time_and_a_date_its_end(client: TestClient):
    hours = pd.date_range("2024-01-01", periods=60, freq="h")
    table = pd.DataFrame(1.0, hours.rename("time"), ["open", "high", "low", "close"])
    upload = client.post("/api/uploads?name=BTCUSDT.csv", content=table.to_csv().encode()).json()
    ends = {}
    for at in ("2024-01-02", "2024-01-02 00:00"):
        answer = ask(client, source=upload["id"], instrument=None, lookback=10, at=at)["result"]
        ends[at] = answer["bars"]["time"][-1]
    assert ends == {"2024-01-02": "2024-01-02 23:00", "2024-01-02 00:00": "2024-01-02 00:00"}
    for at in ("NaT", "now", "2018-06", "2018-06-01 10:00+08:00"):
        answer = client.post("/api/forecasts", json=QUESTION | {"at": at})
        assert answer.status_code == 422 and "is no date such as" in answer.json()["detail"], at


def test_the_same_question_that_waits_is_answered_once():
    calls, go = [], threading.Event()

    def work(asked, report):
        calls.append(len(asked))
        go.wait(10)
        return [{"answer": each} for each in asked]

    queue = JobQueue("test", 8, 8)
    task = Task("test", "same", None, 7, work, {})
    jobs = [queue.submit(task) for _ in range(3)]
    go.set()
    end = time.monotonic() + 10
    while any(job.state != "done" for job in jobs) and time.monotonic() < end:
        time.sleep(0.01)
    queue.close()
    assert calls == [1] and [job.result for job in jobs] == [{"answer": 7}] * 3
    assert all(job.task.payload is None for job in jobs)


def test_one_that_is_cancelled_while_its_batch_begins_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch):
    answer = JobQueue._answer

    def cancel_first(queue: JobQueue, taken) -> None:
        queue.cancel(taken[0][0].id)
        answer(queue, taken)

    held, go = threading.Event(), threading.Event()

    def work(asked, report):
        if asked == ["first"]:
            held.set()
            go.wait(10)
        return [{"answer": each} for each in asked]

    queue = JobQueue("test", 8, 8)
    queue.submit(Task("test", "first", None, "first", work, {}))
    assert held.wait(10)
    jobs = [queue.submit(Task("test", name, "group", name, work, {})) for name in ("one", "other")]
    monkeypatch.setattr(JobQueue, "_answer", cancel_first)
    go.set()
    end = time.monotonic() + 10
    while jobs[1].state in ("queued", "running") and time.monotonic() < end:
        time.sleep(0.01)
    queue.close()
    assert [job.state for job in jobs] == ["cancelled", "done"] and jobs[1].result == {"answer": "other"}
