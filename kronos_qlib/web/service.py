"""What the API and the assistants' tools share: networks, sources, uploads, and the queues that answer questions."""

from collections.abc import Callable, Sequence
from typing import Any

from kronos_qlib.web import market, records
from kronos_qlib.web.forecasts import Forecasts, Prepared, read_date
from kronos_qlib.web.jobs import Job, JobQueue, Report, Task
from kronos_qlib.web.keeping import Keeper
from kronos_qlib.web.networks import Networks
from kronos_qlib.web.problems import Problem
from kronos_qlib.web.schema import (
    CheckQuestion,
    ComparisonQuestion,
    MarketQuestion,
    RecordQuestion,
    Request,
    SignalsQuestion,
)
from kronos_qlib.web.settings import ServerSettings
from kronos_qlib.web.sources import Sources, told_without_paths
from kronos_qlib.web.uploads import Uploads


class Service:
    """Answers questions with what a server was started with.

    Forecasts and rankings wait in one queue, for the networks; comparisons, checks and what commands answer in another,
    so that a report of half a minute holds no forecast up.
    """

    places = {
        "forecasts": "forecast",
        "market": "market",
        "signals": "signals",
        "comparisons": "comparison",
        "checks": "check",
        "records": "record",
    }

    def __init__(self, settings: ServerSettings) -> None:
        self.settings, limits = settings, settings.limits
        self._uploads = None if settings.uploads is None else Uploads(settings.uploads, limits)
        self._keeper = None if settings.ledger is None else Keeper(settings.ledger)
        self.sources = Sources(settings.stores, self._uploads, settings.exchange)
        self.networks = Networks(settings.models, settings.device)
        self.forecasts = Forecasts(settings.paths_shown, self._keeper)
        self._for_networks = JobQueue("forecasts", limits.waiting, limits.answers)
        self._for_reports = JobQueue("reports", limits.waiting, 16)

    def close(self) -> None:
        """End what is being answered."""
        self._for_networks.close()
        self._for_reports.close()

    def queue(self, kind: str) -> JobQueue:
        """Return the queue of a kind of job."""
        return self._for_networks if kind in ("forecast", "market") else self._for_reports

    def job(self, kind: str, job_id: str) -> Job:
        """Return a job of a kind. Raises Problem."""
        job = self.queue(kind).job(job_id)
        if job.task.kind != kind:
            raise Problem(404, f"The job is no {kind}.")
        return job

    def cancel(self, kind: str, job_id: str) -> Job:
        """Cancel a job. Raises Problem."""
        return self.queue(kind).cancel(self.job(kind, job_id).id)

    def place(self, job: Job) -> str:
        """Return the last part of the address of jobs of this kind."""
        return next(place for place, kind in self.places.items() if kind == job.task.kind)

    def status(self, job: Job, result: bool = True) -> dict[str, Any]:
        """Describe a job, as `JobStatus`."""
        found = job.result if result and job.state == "done" else None
        if found is not None:
            found = {name: value for name, value in found.items() if name != "report"}
        return {
            "id": job.id,
            "kind": job.task.kind,
            "state": job.state,
            "progress": round(job.progress, 4),
            "place": self.queue(job.task.kind).place(job),
            "seconds": job.seconds,
            "question": job.task.question,
            "partial": job.partial if result and job.state == "running" else None,
            "result": found,
            "problem": job.problem,
        }

    def ask_forecast(self, prepared: Prepared) -> Job:
        """Ask for a forecast. Raises Problem if too many jobs wait."""
        question, origin = prepared.question.model_dump(), prepared.found.origin
        lasting = self._lasting(None if origin is None else origin.exchange)
        task = Task("forecast", prepared.digest, prepared.group, prepared, self.forecasts.answer, question, lasting)
        return self._for_networks.submit(task)

    def ask_market(self, question: MarketQuestion) -> Job:
        """Ask for a ranking. Raises Problem."""
        prepared = market.prepare(question, self.sources, self.networks, self.settings.limits)
        give_way, keeper = self._for_networks.run_waiting, self._keeper
        lasting = self._lasting(self.sources.exchange_of(prepared.instruments[0]))

        def answer(report: Report) -> dict[str, Any]:
            return market.answer(prepared, report, give_way, keeper)

        return self._submit("market", prepared.digest, question, answer, lasting)

    def ask_signals(self, question: SignalsQuestion) -> Job:
        """Ask for a ranking by a finished run. Raises Problem."""
        uri, ledger = self._runs_uri(), self.settings.ledger
        run = _run_of(records.list_runs(uri), question.run)
        session = self.sources.sessions(question.store, read_date(question.at))[-1]
        date = str(session if ":" in (question.at or "") else session.date())  # of a date, its last score time
        asked = run, question.store, date, self.sources, uri, ledger
        return self._submit("signals", None, question, lambda report: market.rank_by_run(*asked, report))

    def ask_comparison(self, question: ComparisonQuestion) -> Job:
        """Ask for a comparison of runs. Raises Problem."""
        uri = self._runs_uri()
        listed = records.list_runs(uri)
        ids = [_run_of(listed, name)["id"] for name in question.names]
        digest = repr(("comparison", ids))
        return self._submit("comparison", digest, question, lambda report: records.compare(ids, uri, report))

    def ask_check(self, question: CheckQuestion) -> Job:
        """Ask for the health check of a store, or of what `kronos-qlib ingest` makes of a file. Raises Problem."""
        name, upload = question.source, None if self._uploads is None else self._uploads.find(question.source)
        if upload is not None:
            digest = repr(("check", upload.id))
            return self._submit("check", digest, question, lambda report: records.check_upload(upload, report))
        folder = self.sources.store(name).folder
        return self._submit("check", None, question, lambda report: records.check(folder, name, report))

    def ask_record(self, question: RecordQuestion) -> Job:
        """Ask for what came to be filled in and for the record to be judged. Raises Problem."""
        ledger = self._ledger_url()
        return self._submit("record", None, question, lambda report: records.judge_record(ledger, report))

    def _submit(
        self,
        kind: str,
        digest: str | None,
        question: Request,
        answer: Callable[[Report], dict[str, Any]],
        lasting: Callable[[dict[str, Any]], bool] = lambda answer: True,
    ) -> Job:
        """Ask a question that is answered alone."""

        def work(_: Sequence[Any], report: Report) -> list[dict[str, Any]]:
            return [answer(report)]

        return self.queue(kind).submit(Task(kind, digest, None, None, work, question.model_dump(), lasting))

    def _lasting(self, exchange: str | None) -> Callable[[dict[str, Any]], bool]:
        """Return whether an answer need not be made again: what the ledger could not keep yet may be kept later."""
        keeps = self._keeper is not None and exchange is not None
        return lambda answer: not keeps or answer["ledger"] is not None

    def report(self, job_id: str) -> str:
        """Return the page of a comparison that is done. Raises Problem."""
        job = self.job("comparison", job_id)
        if job.result is None:
            raise Problem(404, "This comparison is not done.")
        return str(job.result["report"])

    def health(self, version: str) -> dict[str, Any]:
        """Say what the server offers, as `Health`."""
        queues = self._for_networks, self._for_reports
        return {
            "version": version,
            "waiting": sum(queue.waiting for queue in queues),
            "running": sum(queue.running for queue in queues),
            "uploads": self._uploads is not None,
            "ledger": self.settings.ledger is not None,
            "runs": self.settings.runs is not None,
            "limits": self.settings.limits.model_dump(),
        }

    def models(self) -> list[dict[str, Any]]:
        """List the networks, as `ModelEntry`."""
        found = [self.networks.network(name) for name in self.networks.names]
        return [
            {
                "name": each.name,
                "parameters": each.predictor.model.n_parameters,
                "context": each.predictor.max_context,
                "trained_until": each.trained_until,
                "note": each.note,
            }
            for each in found
        ]

    def stores(self) -> list[dict[str, Any]]:
        """List the stores, as `StoreEntry`."""
        found = []
        for name in self.sources.stores:
            store = self.sources.store(name)
            with told_without_paths(store.folder, name):
                calendar = store.calendar(store.freqs[0])
                ends = [str(time).removesuffix(" 00:00:00") for time in calendar[[0, -1]]]
            found.append(
                {
                    "name": name,
                    "freqs": store.freqs,
                    "universes": store.universes,
                    "instruments": len(store.instruments()),
                    "first": ends[0],
                    "last": ends[1],
                }
            )
        return found

    def instruments(self, source: str, query: str, limit: int) -> dict[str, Any]:
        """Search the instruments of a store or an upload: those that begin with the query first. Raises Problem."""
        upload = self._uploads.find(source) if self._uploads is not None else None
        names = upload.instruments if upload is not None else self.sources.store(source).instruments()
        wanted = query.strip().upper()
        found = [name for name in names if wanted in name.upper()]
        found.sort(key=lambda name: (not name.upper().startswith(wanted), name))
        return {"instruments": found[:limit], "total": len(found)}

    def uploads(self) -> Uploads:
        """Return the uploads. Raises Problem where none are taken."""
        if self._uploads is None:
            raise Problem(404, "This server takes no files; start it with --uploads DIR.")
        return self._uploads

    def runs(self) -> list[dict[str, Any]]:
        """List the finished runs. Raises Problem."""
        return records.list_runs(self._runs_uri())

    def ledger(self) -> dict[str, Any]:
        """Return the ledger's sets and its record. Raises Problem."""
        return records.read_ledger(self._ledger_url())

    def ledger_set(self, set_id: int) -> dict[str, Any]:
        """Return the rows of a set of the ledger. Raises Problem."""
        return records.read_ledger_set(self._ledger_url(), set_id)

    def _runs_uri(self) -> str:
        if self.settings.runs is None:
            raise Problem(404, "This server knows no runs; start it with --runs sqlite:///mlflow.db.")
        return self.settings.runs

    def _ledger_url(self) -> str:
        if self.settings.ledger is None:
            raise Problem(404, "This server has no ledger; start it with --ledger sqlite:///ledger.db.")
        return self.settings.ledger


def _run_of(listed: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Return a finished run by its id, or the newest of an experiment. Raises Problem."""
    for run in listed:
        if name in (run["experiment"], run["id"]):
            return run
    raise Problem(404, f"There is no finished run {name!r} here.")
