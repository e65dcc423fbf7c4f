"""Checkpoints that are written while training continues."""

import threading

import pytest
import torch

from training.checkpoint import BackgroundWriter


def test_training_continues_while_a_checkpoint_is_written():
    written, may_write = [], threading.Event()

    def write(tensors, step):
        may_write.wait(60)
        written.append((step, float(tensors["step|w"])))

    writer, counter = BackgroundWriter(write), torch.tensor(1.0)
    writer({"step|w": counter}, 1)
    counter += 1  # the next step, before anything was written
    assert not written
    may_write.set()
    writer({"step|w": counter}, 2)  # waits for the first
    assert written[:1] == [(1, 1.0)]
    writer.wait()
    assert written == [(1, 1.0), (2, 2.0)]


def test_an_error_is_not_lost():
    def write(tensors, step):
        raise OSError("disk full")

    writer = BackgroundWriter(write)
    writer({}, 1)
    with pytest.raises(OSError, match="disk full"):
        writer.wait()
    writer.wait()  # it is raised once
