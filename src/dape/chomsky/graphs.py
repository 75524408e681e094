"""CUDA graphs of the updates of a training, a graph per length of the examples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Graphs:
    """A CUDA graph per length, with random numbers that continue over replays.

    The first update of a length runs without a graph, and creates objects that must exist before a
    capture, such as the state of the optimizer.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = generators
        self._captured: dict[int, torch.cuda.CUDAGraph | None] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def run(self, length: int, update: Callable[[int], None]) -> None:
        """Run an update of a length on the stream of the graphs."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._generators[0].device)
            self._pool = torch.cuda.graph_pool_handle()
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if length not in self._captured:
                update(length)
                self._captured[length] = None
                return
            graph = self._captured[length] or self._capture(length, update)
            graph.replay()

    def _capture(self, length: int, update: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            update(length)
        self._captured[length] = graph
        return graph
