"""A CUDA graph of a part's forecast: its kernels are recorded once and sent off together for every further part.

A step of generation is some hundred small kernels, and to send one off takes a host longer than a GPU needs to compute
it. Nothing in a forecast hangs on values that the host would have to look at, and all parts of a run have one shape, so
the whole part, from codes to paths, is one graph.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("qlib.KronosForecast")

_Shape = tuple[torch.Size, torch.dtype, torch.device]
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor], torch.device], Replay]
"""From a function of no arguments to one that does the same to the same memory, and gives back the same tensor."""


def capture(function: Callable[[], Tensor], device: torch.device) -> Replay:
    """Record a function's work on a CUDA device.

    Where that fails, torch 2.13 keeps the memory the record had so far, for as long as the process lives.

    Raises:
        RuntimeError: the function does what no graph can hold, such as waiting for the device.
        torch.OutOfMemoryError: a graph keeps memory of its own, and there was not enough.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:  # other threads may go on with their work
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.cuda.set_stream(before)  # torch leaves its own current where a record fails

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


class Recorded:
    """Runs a function of tensors, from its third call on as a recording of it.

    The second call with inputs of one shape (the first may be the only one) runs the function as it is, records it,
    replays the record on the same inputs and compares: only a record that gives bitwise the same result is used. Where
    there is none, every call runs the function, and a warning says why. Inputs of another shape make a new record.

    Args:
        function: of tensors on one device, without side effects, that gives a tensor.
        capture: makes records.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture = capture) -> None:
        self._function, self._capture = function, capture
        self._shapes: list[_Shape] | None = None  # of the last call
        self._inputs: tuple[Tensor, ...] = ()
        self._replay: Replay | None = None
        self._possible = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        again, self._shapes = shapes == self._shapes, shapes
        if again and self._replay is not None:
            return self._replayed(inputs)
        self._forget()  # before the function runs: a record keeps as much memory as it takes
        result = self._function(*inputs)
        if again and self._possible:
            self._record(inputs, result)
        return result

    def _record(self, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        try:
            self._replay = self._capture(lambda: self._function(*self._inputs), expected.device)
            if not torch.equal(self._replayed(inputs), expected):
                raise RuntimeError("the record gave another result")
        except torch.OutOfMemoryError:
            self._forget()
            raise
        except RuntimeError as error:
            self._forget()
            self._possible = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(f"no CUDA graph of the forecast, which takes longer without it ({reason})")

    def _forget(self) -> None:
        self._replay, self._inputs = None, ()

    def _replayed(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        return self._replay().clone()  # the next replay writes into the same memory
