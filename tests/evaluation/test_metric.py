"""The metric as a module of the `evaluate` library."""

import socket
import sys
from pathlib import Path

import evaluate
import pytest

from tinystories_slm.evaluation import metric as module


def test_evaluate_loads_the_metric_from_its_file_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    metric = evaluate.load(str(Path(module.__file__)), keep_in_memory=True)
    metric.add_batch(nats=[3.0, 1.0], num_correct=[1, 2], num_tokens=[2, 2], num_bytes=[4, 4])
    assert metric.compute()["loss"] == 1.0
    assert list(tmp_path.rglob("metric.py"))  # the library's copy
