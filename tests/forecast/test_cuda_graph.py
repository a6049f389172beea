"""A forecast replayed as a graph gives what it gives without one, or is not replayed."""

import weakref

import pytest
import torch

from kronos_qlib.forecast.engine.cuda_graph import GraphedFunction
from kronos_qlib.forecast.engine.generate import path_drawer
from kronos_qlib.forecast.engine.sampling import Sampling, uniforms
from kronos_qlib.forecast.engine.weights import prepare_weights

SAMPLING = Sampling(sample_count=3, temperature=0.6, top_p=0.9)


def record_on_a_cpu(function, device):
    """What a CUDA graph is to its caller: the same memory, read and written again."""
    result = function()
    return lambda: result.copy_(function())


def counted(function):
    calls = []

    def call(*inputs):
        calls.append(1)
        return function(*inputs)

    return call, calls


def window_batches(golden, keys, dtype=torch.float32, device="cpu"):
    """Inputs of `path_drawer` for some keys, and the function itself."""
    tokenizer, model = golden.tokenizer.to(device), golden.model.to(device)
    x, stamp = golden.tensor("x").to(device), golden.tensor("stamp").to(device)
    length, horizon = x.shape[1], stamp.shape[1] - x.shape[1]
    drawn = path_drawer(prepare_weights(tokenizer, model, 512, dtype, length), SAMPLING)
    uniform = [torch.from_numpy(uniforms(0, key + torch.arange(len(x)).numpy(), 3, horizon)).to(device) for key in keys]
    return drawn, [(x.roll(i, 0), stamp[:, :length], stamp[:, length:], u) for i, u in enumerate(uniform)]


@torch.inference_mode()
def test_every_window_batch_is_drawn_as_without_a_graph(small):
    drawn, inputs = window_batches(small, [0, 10, 20, 30])
    function, calls = counted(drawn)
    recorded, records = counted(record_on_a_cpu)
    run = GraphedFunction(function, recorded)
    results = [run(*batch) for batch in inputs]  # kept: a later replay must not write into them
    assert len(records) == 1
    assert not torch.equal(results[1], results[2])
    assert all(torch.equal(result, drawn(*batch)) for result, batch in zip(results, inputs))
    # The first call; the second, its record and the replay that checks it; then one replay for each window batch.
    assert len(calls) == 1 + 3 + 2


def test_another_shape_makes_another_graph():
    recorded, records = counted(record_on_a_cpu)
    run = GraphedFunction(lambda x: 2 * x, recorded)
    for size in (4, 4, 4, 3, 3, 3, 4, 4, 5):  # what comes once only is not worth a record
        x = torch.randn(size)
        assert torch.equal(run(x), 2 * x)
    assert len(records) == 3


def test_a_graph_with_another_result_is_not_used(caplog):
    run = GraphedFunction(lambda x: 2 * x, lambda function, device: lambda: function() + 1)
    for _ in range(3):
        x = torch.randn(4)
        assert torch.equal(run(x), 2 * x)
    assert caplog.text.count("no CUDA graph") == 1 and "another result" in caplog.text


def test_work_that_cannot_be_captured_is_done_without(caplog):
    def refuse(function, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    refused, attempts = counted(refuse)
    run = GraphedFunction(lambda x: 2 * x, refused)
    for _ in range(3):
        x = torch.randn(4)
        assert torch.equal(run(x), 2 * x)
    assert len(attempts) == 1
    assert "not permitted when stream is capturing" in caplog.text and "more lines" not in caplog.text


def test_too_little_memory_for_a_graph_is_an_error_and_smaller_batches_are_captured():
    def record(function, device):
        if len(function()) > 2:
            raise torch.OutOfMemoryError("4 GiB")
        return record_on_a_cpu(function, device)

    recorded, records = counted(record)
    run = GraphedFunction(lambda x: 2 * x, recorded)
    run(torch.randn(4))
    with pytest.raises(torch.OutOfMemoryError):
        run(torch.randn(4))
    for _ in range(3):
        x = torch.randn(2)
        assert torch.equal(run(x), 2 * x)
    assert len(records) == 2


def test_a_graph_is_gone_before_the_run_that_needs_its_memory():
    memory = []

    def record(function, device):
        result = function()
        memory.append(weakref.ref(result))
        return lambda: result.copy_(function())

    def double(x):
        if len(x) == 2:
            assert memory[0]() is None
        return 2 * x

    run = GraphedFunction(double, record)
    for size in (4, 4, 4):
        run(torch.randn(size))
    assert memory[0]() is not None
    run(torch.randn(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_cuda_graph_draws_the_same_paths(small, dtype, caplog):
    drawn, inputs = window_batches(small, [0, 10, 20, 30], dtype, "cuda")
    run = GraphedFunction(drawn)
    for batch in inputs:
        assert torch.equal(run(*batch), drawn(*batch))
    assert "no CUDA graph" not in caplog.text
