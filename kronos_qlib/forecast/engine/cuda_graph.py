"""Replay the forecast of a window batch on a GPU as one CUDA graph.

A step of generation is some hundred small kernels, and a host takes longer to launch one than a GPU to compute it.
Nothing in a forecast depends on values that the host would have to read, and all window batches of a run have one
shape, so a whole window batch, from tokens to paths, is captured once as a graph and replayed for the others.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

logger = logging.getLogger("qlib.KronosForecast")

_Shape = tuple[torch.Size, torch.dtype, torch.device]
Replay = Callable[[], Tensor]
Capture = Callable[[Callable[[], Tensor], torch.device], Replay]
"""From a function without arguments to one that computes the same in the same memory and returns the same tensor."""


def capture(function: Callable[[], Tensor], device: torch.device) -> Replay:
    """Capture a function's work on a CUDA device.

    Where that fails, torch 2.13 keeps the memory of the capture for as long as the process lives.

    Raises:
        RuntimeError: the function does what no graph can hold, such as waiting for the device.
        torch.OutOfMemoryError: a graph keeps memory of its own, and there was not enough.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        try:  # other threads may go on with their work
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
                result = function()
        finally:
            torch.cuda.set_stream(stream)  # torch leaves the capture's stream current where a capture fails

    def replay() -> Tensor:
        with torch.cuda.device(device):
            graph.replay()
        return result

    return replay


class GraphedFunction:
    """Call a function of tensors, from its third call on by replaying a graph of it.

    The second call with inputs of one shape (the first may be the only one) runs the function, captures it, replays the
    graph on the same inputs and compares: only a graph that gives bitwise the same result is used. Without one every
    call runs the function, and a warning says why. Inputs of another shape are captured anew.

    Args:
        function: of tensors on one device, without side effects, that returns a tensor.
        capture: makes graphs.
    """

    def __init__(self, function: Callable[..., Tensor], capture: Capture = capture) -> None:
        self._function, self._capture = function, capture
        self._shapes: list[_Shape] | None = None  # of the last call
        self._inputs: tuple[Tensor, ...] = ()
        self._graph: Replay | None = None
        self._can_capture = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs]
        same_shapes, self._shapes = shapes == self._shapes, shapes
        if same_shapes and self._graph is not None:
            return self._replay(self._graph, inputs)
        self._discard()  # before the function runs: a graph keeps as much memory as it takes
        result = self._function(*inputs)
        if same_shapes and self._can_capture:
            self._try_capture(inputs, result)
        return result

    def _try_capture(self, inputs: tuple[Tensor, ...], expected: Tensor) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        try:
            self._graph = self._capture(lambda: self._function(*self._inputs), expected.device)
            if not torch.equal(self._replay(self._graph, inputs), expected):
                raise RuntimeError("the graph gave another result")
        except torch.OutOfMemoryError:
            self._discard()
            raise
        except RuntimeError as error:
            self._discard()
            self._can_capture = False
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(f"no CUDA graph of the forecast, which takes longer without it ({reason})")

    def _discard(self) -> None:
        self._graph, self._inputs = None, ()

    def _replay(self, graph: Replay, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        return graph().clone()  # the next replay writes into the same memory
