"""Chunks on a Ray cluster of two nodes on this machine, one of which is lost."""

from importlib.util import find_spec

import pytest
from forks import environment
from tasks import assert_same, make_task, run

from kronos_qlib.forecast import run as runs

# Imported by the tests, in one process of the suite: it takes seconds.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed"),
]

NODE = {"num_cpus": 1, "include_log_monitor": False}  # each of Ray's own processes takes seconds


@pytest.fixture
def cluster(monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(runs, "CHUNK_WINDOWS", 32)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    head = NODE | {"include_dashboard": False, "no_monitor": True}
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
    except Exception:  # Ray gives a node 30 seconds to start, which a busy machine may need: once more
        cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_costs_its_chunks_only_and_the_scores_are_those_of_one_process(cluster, tmp_path, monkeypatch):
    import ray

    plain, _ = run(make_task())
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    written, lost = [], []
    write = runs.ChunkStore.write

    def then_lose_a_node(self, table):
        path = write(self, table)
        written.append(path)
        if len(written) == 3:
            cluster.remove_node(second, allow_graceful=False)
            lost.append(second)
        return path

    monkeypatch.setattr(runs.ChunkStore, "write", then_lose_a_node)
    values, resumed = run(make_task(), tmp_path, engine="ray")
    assert lost and resumed == 0 and len(written) > 10
    assert_same(values, plain)
    assert not second.any_processes_alive()
    again, resumed = run(make_task(), tmp_path)  # by this process: nothing is left
    assert resumed == len(make_task())
    assert_same(again, plain)


def test_without_a_cluster_one_is_asked_for(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match="found no cluster at 'auto'; start one"):
        run(make_task(), engine="ray")
    assert not ray.is_initialized()
