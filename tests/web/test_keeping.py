"""Forecasts and rankings of a server are kept in its ledger, judged when what came is filled in; runs rank a market."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finished_runs import DATE, Place
from questions import QUESTION, Make, ask, wait_for
from starlette.testclient import TestClient

from kronos_qlib.live.judgement import counted_sets, judge
from kronos_qlib.live.ledger import Ledger, LedgerError
from kronos_qlib.web import keeping

AT = "2018-07-02"
RANKING = {"store": "market", "universe": "demo", "at": AT, "lookback": 20, "horizon": 3, "samples": 4}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/kept.db"


@pytest.fixture
def keeping_client(make_client: Make, url: str) -> TestClient:
    return make_client(ledger=url, exchange="XSHG")


def answered(client: TestClient, place: str, question: dict) -> dict:
    answer = client.post(f"/api/{place}", json=question)
    assert answer.status_code == 202, answer.text
    status = wait_for(client, place, answer.json()["id"])
    assert status["state"] == "done", status["problem"]
    return status["result"]


def test_a_forecast_is_kept_with_what_was_asked_and_once(keeping_client: TestClient, url: str, market: Path):
    first = ask(keeping_client, at=AT)["result"]
    assert first["ledger"] == {"set": 1, "version": 1, "new": True, "live": False}
    assert "Kept in the ledger as set 1, simulated" in " ".join(first["notes"])
    other = ask(keeping_client, at=AT, seed=8)["result"]["ledger"]
    assert (other["set"], other["version"]) == (2, 1)  # another question, no version of the first
    sets, rows = Ledger(url).read()
    assert sets.loc[1, "experiment"] == "page market tiny, 30 + 5 bars × 8" and sets.loc[1, "store"] == str(market)
    assert sets.loc[1, "settings"]["question"]["samples"] == QUESTION["samples"]
    assert sets.loc[1, "date"] == pd.Timestamp(AT) and sets.loc[1, "horizon"] == 5
    row = rows.loc[(1, "DEMO0001")]
    assert row["last_close"] == first["last_close"] and row["prob_up"] == first["figures"]["prob_up"]
    returns = [first["quantiles"][name][-1] / first["last_close"] - 1 for name in ("q05", "q50", "q95")]
    np.testing.assert_allclose(row[["q05", "q50", "q95"]].astype(float), returns, rtol=1e-12)


def test_the_same_question_to_another_server_is_the_set_that_is_there(make_client: Make, url: str):
    places = [ask(make_client(ledger=url, exchange="XSHG"), at=AT)["result"]["ledger"] for _ in range(2)]
    assert [place["set"] for place in places] == [1, 1] and not places[1]["new"]


def test_what_cannot_be_live_or_judged_is_not_kept_and_that_is_said(
    make_client: Make, url: str, monkeypatch: pytest.MonkeyPatch
):
    unknown = make_client(ledger=url)
    answer = ask(unknown, at=AT)["result"]
    assert answer["ledger"] is None and "start the server with --exchange" in " ".join(answer["notes"])
    client = make_client(ledger=url, exchange="XSHG")
    body = b"time,open,high,low,close\n" + b"".join(b"2024-01-%02d,1,2,1,2\n" % day for day in range(2, 20))
    upload = client.post("/api/uploads?name=mine.csv", content=body).json()
    answer = ask(client, source=upload["id"], instrument=None, lookback=10)["result"]
    assert answer["ledger"] is None and "a file gets no later bars" in " ".join(answer["notes"])
    closes_at = pd.Timestamp("2018-07-02 07:00", tz="UTC")  # 15:00 in Shanghai
    for now, kept in ((closes_at - pd.Timedelta(minutes=1), False), (closes_at, True)):
        monkeypatch.setattr(keeping, "_now", lambda now=now: now)
        assert (ask(client, at=AT, seed=int(kept))["result"]["ledger"] is not None) == kept
    assert len(Ledger(url).read()[0]) == 1


def test_a_ranking_is_kept_as_one_set_by_rank(keeping_client: TestClient, url: str):
    answer = answered(keeping_client, "market", RANKING)
    assert answer["ledger"]["set"] == 1
    sets, rows = Ledger(url).read()
    assert (
        sets.loc[1, "experiment"] == "page market tiny, 20 + 3 bars × 4, demo"
        and sets.loc[1, "label"] == "Ref($close, -3)/$close - 1"
    )
    own = rows.loc[1]
    for row in answer["rows"]:
        kept = own.loc[row["instrument"]]
        assert (kept["rank"], kept["score"], kept["last_close"]) == (row["rank"], row["score"], row["last_close"])
        assert kept["q50"] == pytest.approx(row["median"])


@pytest.mark.slow
def test_what_came_is_filled_in_and_the_record_judged(keeping_client: TestClient, url: str):
    first = ask(keeping_client, at=AT)["result"]
    ask(keeping_client, at=AT, instrument="DEMO0002")
    ranking = answered(keeping_client, "market", RANKING)
    found = answered(keeping_client, "records", {})
    assert found["updated"]["changed_closes"] == 0 and found["updated"]["returns"] == 2 + len(ranking["rows"])
    sets, rows = Ledger(url).read()
    came = first["came"]["close"][-1] / first["last_close"] - 1
    assert rows.loc[(1, "DEMO0001"), "came"] == pytest.approx(came, rel=1e-6)
    sentences = [sentence for entry in found["judgements"] for sentence in entry["sentences"]]
    single = next(
        sentence for sentence in sentences if sentence.startswith("page market tiny, 30 + 5 bars × 8 simulated")
    )
    assert "returns that have come: 2;" in single  # of two instruments on one date
    assert any("page market tiny, 20 + 3 bars × 4, demo simulated rank IC" in sentence for sentence in sentences)
    assert [each.figures["outcomes"] for each in judge(sets, rows)] == [float(len(ranking["rows"])), 2.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kronos", "lightgbm"])
def test_a_finished_run_ranks_the_market_as_its_backtest_did(make_client: Make, place: Place, url: str, name: str):
    client = make_client(stores={"mine": place.store}, runs=place.uri, ledger=url)
    answer = answered(client, "signals", {"run": name, "store": "mine", "at": str(DATE.date())})
    scores = place.open(name).found.read("pred.pkl").xs(DATE, level="datetime")
    found = {row["instrument"]: row["score"] for row in answer["rows"]}
    assert found == scores.to_dict()
    ranks = scores.rank(ascending=False, method="min")
    assert [row["rank"] for row in answer["rows"]] == sorted(ranks)
    assert all(row["rank"] == ranks[row["instrument"]] for row in answer["rows"])
    assert (answer["rows"][0]["prob_up"] is None) == (name == "lightgbm")
    assert answer["run"] == name and answer["ledger"]["set"] == 1 and len(answer["rows"][0]["sparkline"]) == 40
    refused = client.post("/api/signals", json={"run": "other", "store": "mine"})
    assert refused.status_code == 404 and "no finished run" in refused.json()["detail"]


def test_who_asks_again_with_another_seed_does_not_choose_the_record(keeping_client: TestClient, url: str):
    for seed in (1, 2, 3):
        ask(keeping_client, at=AT, seed=seed)
    ask(keeping_client, at=AT, instrument="DEMO0002")
    sets, _ = Ledger(url).read()
    assert list(counted_sets(sets).index) == [1, 4] and sets["experiment"].nunique() == 1
    ask(keeping_client, at=AT, temperature=0.5)
    assert "temperature 0.5" in Ledger(url).read()[0]["experiment"].iloc[-1]


def test_what_could_not_be_kept_is_kept_when_it_is_asked_again(
    keeping_client: TestClient, url: str, monkeypatch: pytest.MonkeyPatch
):
    def locked(*_: object, **__: object) -> None:
        raise LedgerError("another process has locked it")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "record", locked)
        answer = ask(keeping_client, at=AT)["result"]
        assert answer["ledger"] is None and "another process has locked it" in " ".join(answer["notes"])
    assert ask(keeping_client, at=AT)["result"]["ledger"]["set"] == 1
    assert ask(keeping_client, at=AT)["seconds"] == 0.0
