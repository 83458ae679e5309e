"""A run around its steps: the order of its examples, and what stops it."""

import os
import signal

from grpo.run.training import Interrupt, shuffled


def test_examples_come_in_another_order_each_epoch_and_the_order_continues():
    places = shuffled(5, seed=3, start=0)
    epochs = [[next(places) for _ in range(5)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(5)]] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    later = shuffled(5, seed=3, start=7)
    assert [next(later) for _ in range(8)] == [*epochs[1][2:], *epochs[2]]


def test_a_second_signal_stops_at_once(monkeypatch):
    sent = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: sent.append((number, handler)))
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    interrupt = Interrupt()
    del sent[:]
    interrupt._request(signal.SIGTERM, None)
    assert interrupt.requested and not sent
    interrupt._request(signal.SIGTERM, None)
    assert sent == [(signal.SIGTERM, signal.SIG_DFL), (os.getpid(), signal.SIGTERM)]
