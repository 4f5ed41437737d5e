"""Steps of the loop as CUDA graphs: a step is captured after two runs that enqueue the same work, then replayed."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from ..errors import RealisIDWarning
from .cuda_memory import Gpu, gpu_errors
from .cuda_usage import GpuUsage

GRAPHS = 16  # captured steps that are kept; a request with a delayed ID has two


class Graph(NamedTuple):
    """A captured step, and the rows that each network evaluates in it."""

    captured: Any
    rows: dict[str, int]


class CapturedSteps:
    """The graphs of one backend.

    usage:     of the step that runs; what a replay evaluates is added to it.
    graphs:    the captured steps by signature, the last used last.
    trace:     what was enqueued since a step began, with every address: its signature.
    repeating: inside a step that may be captured.
    """

    def __init__(self, gpu: Gpu, usage: GpuUsage, capture: bool) -> None:
        """capture: False only runs the steps."""
        self.usage = usage
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self.trace: list[Hashable] = []
        self.repeating = False
        self._gpu, self._capture, self._interruptions = gpu, capture, 0

    def note(self, *enqueued: Hashable) -> None:
        """Called for everything that is enqueued, with all that a graph of it would hold."""
        if self.repeating:
            self.trace.append(enqueued)

    def interrupt(self) -> None:
        """Called when other work than the pass's steps follows, which may move scratch memory or networks."""
        self._interruptions += 1

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a function that is captured after two identical runs and replayed afterwards. A step that an
        earlier pass captured is replayed from its second call on.

        All arrays of a step keep their addresses until the pass ends, and all values that change from step to step are
        on the device. A replay therefore repeats the step exactly. A later pass reuses the graph if its first call
        enqueues the same work at the same addresses.
        """
        graph: Graph | None = None
        last: Hashable = None
        settled, interruptions = False, self._interruptions

        def recorded() -> None:
            nonlocal graph, last, settled, interruptions
            if interruptions != self._interruptions:  # what the graph holds may be elsewhere: its signature tells
                graph, last, settled, interruptions = None, None, False, self._interruptions
            if graph is None and last in self.graphs:
                self.graphs.move_to_end(last)
                graph = self.graphs[last]
            elif graph is None and settled and self._capture:
                graph = self._captured(step, last)
            if graph is not None:
                self._replay(graph)
                return
            before, last = last, self._traced(step)
            settled = last == before

        return recorded if self._capture else step

    def _traced(self, step: Callable[[], None]) -> Hashable:
        """Runs the step. Returns everything that it enqueued."""
        self.trace.clear()
        self.repeating = self._capture
        try:
            step()
        finally:
            self.repeating = False
        return tuple(self.trace)

    def _captured(self, step: Callable[[], None], signature: Hashable) -> Graph | None:
        """The step as a graph, kept for later passes; None if capture is refused."""
        before, traced = dict(self.usage.rows), list[Hashable]()
        try:
            captured = self._gpu.capture(lambda: traced.append(self._traced(step)))
        except Exception as error:  # its type depends on the library that runs the networks
            self._refused(error)
            return None
        finally:
            rows = {name: count - before.get(name, 0) for name, count in self.usage.rows.items()}
            self.usage.rows.clear()
            self.usage.rows.update(before)
        if traced != [signature]:
            self._refused(RuntimeError("it enqueued other work while it was captured"))
            return None
        if len(self.graphs) >= GRAPHS:
            self._gpu.wait()  # the oldest may still be running
            self.graphs.popitem(last=False)
        self.graphs[signature] = graph = Graph(captured, rows)
        return graph

    def _replay(self, graph: Graph) -> None:
        with gpu_errors():
            graph.captured.launch(self._gpu.stream)
        for name, rows in graph.rows.items():
            self.usage.add(name, rows, 0.0)
            self.usage.replayed.add(name)

    def _refused(self, error: Exception) -> None:
        self._capture = False
        warnings.warn(
            f"a step could not be captured as a CUDA graph ({error}); from now on steps run one launch at a time. "
            "Engine.load(…, cuda_graph=False) avoids the attempt.",
            RealisIDWarning,
            stacklevel=2,
        )
