import asyncio
import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from questions import QUESTION, Make, ask
from starlette.testclient import TestClient

from kronos_qlib.web.safety import Safety
from kronos_qlib.web.settings import Limits, ServerSettings, check_token, name_folders, name_models

TOKEN = "correct-horse-battery"
CSV = "date,open,high,low,close,volume\n" + "".join(f"2024-01-{day:02d},1,2,1,1.5,9\n" for day in range(1, 29))


def upload(client: TestClient, content: bytes | str, name: str = "bars.csv"):
    return client.post("/api/uploads", params={"name": name}, content=content)


def is_problem(answer, status: int, says: str = "") -> bool:
    found = answer.json()
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert found["status"] == status and found["title"] and says in found["detail"], found
    assert "Traceback" not in answer.text and "site-packages" not in answer.text
    return True


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "127.0.0.1@evil.example", "a:b:c", "[::"]
)
def test_a_host_of_another_name_is_refused(client: TestClient, host: str):
    for path in ("/", "/api/health"):
        assert is_problem(client.get(path, headers={"Host": host}), 421, "not called so")


def test_the_port_is_part_of_the_host(make_client: Make):
    client = make_client(port=7070, hosts=("bars.example",))
    assert client.get("/api/health", headers={"Host": "localhost:7070"}).status_code == 200
    assert client.get("/api/health", headers={"Host": "bars.example"}).status_code == 200
    assert is_problem(client.get("/api/health", headers={"Host": "localhost:9"}), 421)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_is_refused(client: TestClient, headers: dict[str, str]):
    assert is_problem(client.post("/api/forecasts", json=QUESTION, headers=headers), 403, "another site")
    assert is_problem(client.get("/api/health", headers=headers), 403)


def test_the_own_page_may_ask_and_nobody_else_is_let_in_by_cors(client: TestClient):
    answer = client.post("/api/forecasts", json=QUESTION, headers={"Origin": "http://127.0.0.1"})
    assert answer.status_code == 202
    names = {name.lower() for name in answer.headers}
    assert not {"set-cookie", "access-control-allow-origin"} & names
    assert is_problem(client.options("/api/forecasts", headers={"Access-Control-Request-Method": "POST"}), 405)


def test_the_policy_allows_no_script_or_style_in_html(client: TestClient):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert "style=" not in page.text and "<style" not in page.text and "onclick" not in page.text
    assert page.text.count("<script") == page.text.count("<script src=") + page.text.count('<script type="module" src=')
    assert "http://" not in page.text and "https://" not in page.text


def test_every_part_of_the_page_is_served_and_nothing_else(client: TestClient):
    for name in ("main.js", "page.css", "strings.js", "plotly.min.js", "icon.svg"):
        assert client.get(f"/page/{name}").status_code == 200
    for path in (
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page/__init__.py",
        "/docs",
        "/etc/passwd",
    ):
        assert is_problem(client.get(path), 404)


def test_the_token_is_asked_for_and_compared(make_client: Make):
    client = make_client(token=TOKEN)
    for headers in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
        answer = client.get("/api/stores", headers={name: value.encode() for name, value in headers.items()})
        assert is_problem(answer, 401, "token") and answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/api/stores", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/").status_code == 200, "the page holds nothing; it asks for the token"


def test_other_machines_need_a_token_that_is_long():
    check_token("127.0.0.1", None)
    check_token("0.0.0.0", TOKEN)
    for host, token in (("0.0.0.0", None), ("192.168.1.5", None), ("127.0.0.1", "short")):
        with pytest.raises(ValueError, match="--token|16"):
            check_token(host, token)


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"source": "../market"}, 422, "source"),
        ({"source": "/etc"}, 422, "source"),
        ({"source": "nothing"}, 404, "no store or upload"),
        ({"source": "upload-0000000000000000"}, 404, "no store or upload"),
        ({"instrument": "../../../etc/passwd"}, 422, "instrument"),
        ({"instrument": ".."}, 404, "no instrument"),
        ({"instrument": "NONE"}, 404, "no instrument"),
        ({"instrument": "DEMO0001:x"}, 404, "no instrument"),
        ({"model": "/tmp"}, 422, "model"),
        ({"model": "base"}, 404, "no model"),
        ({"at": "yesterday-ish"}, 422, "no date"),
        ({"at": "2001-01-01"}, 422, "0 bars"),
        ({"at": "2018-05-05T00:00+08:00"}, 422, "no date"),
        ({"horizon": 0}, 422, "horizon"),
        ({"horizon": 501}, 422, "the most"),
        ({"lookback": 2049}, 422, "2,048 is the most"),
        ({"samples": 1001}, 422, "1,000 is the most"),
        ({"samples": 1000, "horizon": 500}, 422, "samples × horizon"),
        ({"temperature": 0}, 422, "temperature"),
        ({"top_p": 1.5}, 422, "top_p"),
        ({"seed": -1}, 422, "seed"),
        ({"unknown": 1}, 422, "unknown"),
        ({"samples": "many"}, 422, "samples"),
    ],
)
def test_a_bad_question_is_answered_with_a_sentence(make_client: Make, changes: dict, status: int, says: str):
    client = make_client({"bars": 400_000})
    assert is_problem(client.post("/api/forecasts", json=QUESTION | changes), status, says)


def test_what_is_no_json_is_refused(client: TestClient):
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff\xfe", b"[1]", b"null", b'{"source": NaN}', b"[" * 20_000):
        answer = client.post("/api/forecasts", content=content, headers=headers)
        assert answer.status_code in (400, 422) and is_problem(answer, answer.status_code)


def test_a_request_that_is_too_large_is_refused(make_client: Make):
    client = make_client({"request_bytes": 2000, "upload_bytes": 3000})
    assert is_problem(client.post("/api/forecasts", content=b" " * 2001), 413, "2,000 bytes")
    assert is_problem(upload(client, b"x" * 3001), 413, "3,000 bytes")
    assert is_problem(upload(client, iter([b"x" * 1000] * 4)), 413), "without a length that is declared"
    assert client.get("/api/uploads").json() == []


def test_nothing_is_left_of_an_upload_that_is_refused(client: TestClient, settings: ServerSettings):
    assert is_problem(upload(client, "no bars at all"), 422)
    assert is_problem(upload(client, b"\x80\x04\x95pickle", "bars.pkl"), 415, "should end in")
    assert is_problem(upload(client, b"PAR1" + b"\0" * 64 + b"PAR1", "bars.parquet"), 422, "bars.parquet")
    assert list(settings.uploads.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../../evil.csv", "..\\..\\evil.csv", "/etc/cron.d/evil.csv", "a\x00b.csv", "...csv", "😀.csv"]
)
def test_the_name_of_an_upload_leads_nowhere(client: TestClient, settings: ServerSettings, name: str):
    sent = upload(client, CSV, name)
    assert sent.status_code == 201, sent.text
    for path in settings.uploads.parent.rglob("*"):
        assert path.is_relative_to(settings.uploads) or path == settings.uploads
    assert "/" not in sent.json()["name"] and str(settings.uploads) not in sent.text
    assert ask(client, source=sent.json()["id"], instrument=None, lookback=10)["state"] == "done"


def test_bombs_are_refused_before_they_are_unpacked(make_client: Make):
    client = make_client({"unpacked_bytes": 2**20, "rows": 1000, "columns": 20})
    zeros = b"0" * (8 * 2**20)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bars.csv", zeros)
    assert is_problem(upload(client, packed.getvalue(), "b.zip"), 413, "unpacked")
    assert is_problem(upload(client, gzip.compress(zeros), "b.csv.gz"), 413, "unpacked")
    table = io.BytesIO()
    pq.write_table(pa.table({"close": np.zeros(5000)}), table)
    assert is_problem(upload(client, table.getvalue(), "b.parquet"), 413, "5,000 rows")
    wide = ",".join(f"c{number}" for number in range(30)) + "\n"
    assert is_problem(upload(client, wide * 3), 413, "columns")
    times = pd.date_range("2020", periods=1001, freq="h").strftime("%Y-%m-%d %H:%M")
    long = "time,open,high,low,close\n" + "".join(f"{time},1,1,1,1\n" for time in times)
    assert is_problem(upload(client, long), 413, "rows")


def test_only_so_many_uploads_are_kept(make_client: Make):
    client = make_client({"files": 2})
    for number in range(4):
        assert upload(client, CSV, f"file{number}.csv").status_code == 201
    assert [entry["name"] for entry in client.get("/api/uploads").json()] == ["file3.csv", "file2.csv"]


def test_links_that_lead_out_of_a_store_or_of_the_uploads_are_not_read(
    make_client: Make, market: Path, tmp_path: Path, settings: ServerSettings
):
    import shutil

    store, outside = tmp_path / "store", tmp_path / "outside"
    shutil.copytree(market, store)
    shutil.move(store / "features" / "demo0001", outside)
    (store / "features" / "demo0001").symlink_to(outside)
    (store / "features" / "demo0002" / "close.day.bin").unlink()
    (store / "features" / "demo0002" / "close.day.bin").symlink_to(outside / "close.day.bin")
    client = make_client(stores={"market": store})
    for instrument in ("DEMO0001", "DEMO0002"):
        assert is_problem(client.post("/api/forecasts", json=QUESTION | {"instrument": instrument}), 404, "outside")
    sent = upload(client, CSV).json()
    folder = settings.uploads / sent["id"]
    (folder / "bars.csv").unlink()
    (folder / "bars.csv").symlink_to("/etc/passwd")
    assert is_problem(client.post("/api/forecasts", json=QUESTION | {"source": sent["id"]}), 404)


def test_an_error_of_the_server_shows_no_stack(make_client: Make, monkeypatch: pytest.MonkeyPatch):
    client = make_client()

    def fail(*_):
        raise RuntimeError("/secret/place")

    monkeypatch.setattr("kronos_qlib.web.service.Service.stores", fail)
    answer = client.get("/api/stores")
    assert is_problem(answer, 500, "log") and "secret" not in answer.text
    assert client.get("/api/health").status_code == 200


def test_a_slow_client_is_left():
    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def never():
        await asyncio.sleep(60)

    said = []

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": "/api/forecasts", "headers": [(b"host", b"localhost")]}
    safety = Safety(app, ServerSettings(limits=Limits(seconds=0.05)))
    asyncio.run(safety(scope, never, send))
    assert said[0]["status"] == 408 and "seconds" in json.loads(said[1]["body"])["detail"]


def test_more_requests_than_can_be_served_are_refused(make_client: Make):
    async def app(scope, receive, send):
        await asyncio.sleep(0.2)

    async def crowd() -> list[int]:
        said = []

        async def send(message):
            if message["type"] == "http.response.start":
                said.append(message["status"])

        safety = Safety(app, ServerSettings(limits=Limits(requests=3)))
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
        await asyncio.gather(*(safety(scope, None, send) for _ in range(8)))
        await safety(scope, None, send)
        return said

    assert asyncio.run(crowd()) == [503] * 5


def test_folders_of_one_name_get_names_of_their_own(tmp_path: Path):
    folders = [tmp_path / "a" / "market", tmp_path / "b" / "market", tmp_path / "a" / "market", tmp_path / "<x> y"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    assert list(name_folders(folders)) == ["market", "market-2", "x-y"]


def test_models_of_one_name_get_names_of_their_own(checkpoint: Path, tmp_path: Path):
    (tmp_path / "nano").mkdir()
    named = name_models(["nano", str(tmp_path / "nano"), str(checkpoint)])
    assert named == {"nano": "nano", "nano-2": str(tmp_path / "nano"), "tiny": str(checkpoint)}


def test_a_server_that_others_reach_by_a_proxy_needs_a_token():
    with pytest.raises(ValueError, match="bars.example.org"):
        check_token("127.0.0.1", None, ["bars.example.org"])
    check_token("127.0.0.1", "correct-horse-battery", ["bars.example.org"])


def test_a_port_may_be_left_out_or_be_a_tunnel_s(make_client: Make):
    usual = make_client(port=80)
    assert usual.get("/api/health", headers={"Host": "localhost"}).status_code == 200
    other = make_client(port=7070, hosts=("localhost:8080",))
    assert other.get("/api/health", headers={"Host": "localhost:8080"}).status_code == 200
    assert other.get("/api/health", headers={"Host": "localhost:8081"}).status_code == 421


def test_a_body_that_grows_too_large_is_refused_with_the_reason(make_client: Make):
    client = make_client({"request_bytes": 1024})
    pieces = (b"x" * 500 for _ in range(9))  # in chunks, no length is declared
    answer = client.post("/api/forecasts", content=pieces, headers={"Content-Type": "application/json"})
    assert is_problem(answer, 413, "1,024 bytes")
    strange = client.get("/api/health", headers={"Origin": "http://["})
    assert strange.status_code == 403


def test_a_table_that_unpacks_to_more_than_it_says_is_refused(make_client: Make, tmp_path: Path):
    client = make_client({"unpacked_bytes": 2**22, "columns": 20})
    wide = pa.array(["x" * 20_000] * 900)
    bombs = {}
    for name, column in {"plain": wide, "coded": wide.dictionary_encode(), "nested": pa.array([[["x"]]])}.items():
        pq.write_table(pa.table({"close": column}), tmp_path / name, compression="zstd")
        bombs[name] = (tmp_path / name).read_bytes()
        assert len(bombs[name]) < 2000
    bomb = bombs["plain"]
    for name, content, status in (
        ("plain.parquet", bomb, 413),
        ("coded.parquet", bombs["coded"], 413),
        ("nested.parquet", bombs["nested"], 415),
        ("bomb.csv", bomb, 415),
        ("bomb.csv.gz", gzip.compress(bomb), 415),
        ("wide.csv.gz", gzip.compress(",".join(["close"] * 30).encode()), 413),
    ):
        assert client.post(f"/api/uploads?name={name}", content=content).status_code == status, name
