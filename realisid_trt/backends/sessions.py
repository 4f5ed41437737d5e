"""Options of ONNX Runtime's sessions: the same on a CPU, on a GPU and during a build."""

from __future__ import annotations

from typing import Any

import onnxruntime as ort


def session_options(threads: int = 0) -> Any:
    """ONNX Runtime's SessionOptions for sessions that run one after another.

    threads: of the session's own pool, the calling thread included; 0: ONNX Runtime's choice, one per physical core.

    The threads wait without spinning. By default they spin after every operator and for a while after the last one, so
    thirteen sessions in turn occupy the cores that the next one needs. One pool for all sessions of a process would
    prevent that too. But then a process could not hold engines of "cpu:1" and "cpu:2", and ONNX Runtime would refuse
    every session that a caller opens with default options.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options
