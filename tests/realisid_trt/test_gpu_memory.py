"""The arena on a GPU, and the turns of engines in it, tested without a GPU: a wrong order would fail on a real one."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from typing import Any

import pytest

from realisid_trt.backends.cuda import _end
from realisid_trt.backends.cuda_memory import CHUNK_BYTES, Arena, Gpu, _no_collection
from realisid_trt.backends.onnxruntime_cuda import SharedArena


class Buffer:
    def __init__(self, size: int, log: list[str]) -> None:
        self.size, self.handle, self._log = size, 256, log
        log.append(f"took {size}")

    def close(self) -> None:
        self._log.append(f"gave {self.size}")


def test_pieces_are_given_back_before_one_is_taken() -> None:
    """The stream's pool keeps freed memory until the stream is waited for."""
    log: list[str] = []
    arena = Arena(lambda nbytes: Buffer(nbytes, log), lambda: log.append("waited"))
    for _ in range(2):
        arena.take(CHUNK_BYTES)
    log.clear()
    arena.reset()
    assert log == [f"gave {CHUNK_BYTES}"] * 2 + ["waited", f"took {2 * CHUNK_BYTES}"]
    log.clear()
    arena.reset()
    assert log == []


class Stream:
    def __init__(self) -> None:
        self.ended = False

    def wait(self, other: Any) -> None:
        if other.ended:
            raise RuntimeError("the stream has ended")


def shared() -> SharedArena:
    arena = SharedArena.__new__(SharedArena)
    arena._turn, arena._stream = threading.RLock(), None
    return arena


def test_an_engine_that_is_collected_within_a_turn_leaves_it() -> None:
    arena, dropped, stays = shared(), Stream(), Stream()

    class Engine:
        """In a reference cycle, so that the garbage collector ends it."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            arena.leave(dropped)
            dropped.ended = True

    with arena.turn(dropped):
        pass
    engine = Engine()
    done = threading.Event()

    def turn() -> None:
        with arena.turn(stays):
            gc.collect()  # as it may happen at any allocation
        done.set()

    del engine
    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    assert done.wait(30), "the turn waits for itself"


def test_a_stream_that_ended_meanwhile_is_not_waited_for() -> None:
    arena, dropped = shared(), Stream()
    with arena.turn(dropped):
        pass

    class Waits(Stream):
        def wait(self, other: Any) -> None:
            dropped.ended = True  # its engine is collected here
            arena.leave(dropped)
            super().wait(other)

    with arena.turn(Waits()):
        pass
    with arena.turn(dropped):
        pass
    with pytest.raises(RuntimeError, match="has ended"), arena.turn(Stream()):  # one that did not leave is a fault
        pass


def test_a_capture_is_not_interrupted_by_the_collector() -> None:
    class Builder:
        def begin_building(self, mode: str) -> None: ...

        def end_building(self) -> None: ...

        def complete(self) -> str:
            return "graph"

    class Capturing:
        capturing = False
        stream = type("Stream", (), {"create_graph_builder": staticmethod(Builder)})

    gpu: Any = Capturing()
    found = []
    assert Gpu.capture(gpu, lambda: found.append((gpu.capturing, gc.isenabled()))) == "graph"
    assert found == [(True, False)] and gc.isenabled() and not gpu.capturing

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Gpu.capture(gpu, fail)
    assert gc.isenabled()


def test_two_captures_at_once() -> None:
    """The end of one does not enable the garbage collector during the other."""
    inner_done, outer_may_end, found = threading.Event(), threading.Event(), list[bool]()

    def outer() -> None:
        with _no_collection():
            outer_may_end.wait(30)
            found.append(gc.isenabled())

    thread = threading.Thread(target=outer)
    thread.start()
    with _no_collection():
        inner_done.set()
    outer_may_end.set()
    thread.join()
    assert found == [False] and gc.isenabled()


def test_graphs_end_after_the_stream_is_idle() -> None:
    log: list[str] = []

    class Logged:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            log.append("waited")

        def close(self) -> None:
            log.append(f"{self.name} closed")

    class Graph:
        def __del__(self) -> None:
            log.append("graph freed")

    graphs: Any = OrderedDict(one=Graph())
    _end(Logged("runner"), Logged("gpu"), graphs, {1: Logged("kept")})  # type: ignore[arg-type]
    assert log == ["waited", "graph freed", "runner closed", "kept closed", "gpu closed"]
