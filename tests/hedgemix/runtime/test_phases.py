"""Seconds by phase: by the host's clock, or by events that are only waited for at the end."""

from __future__ import annotations

import time

import torch

from hedgemix.runtime.phases import Phases

CPU = torch.device("cpu")


def test_on_a_cpu_a_phase_takes_what_its_work_does() -> None:
    phases = Phases({"a": 1.0, "b": 0.0}, CPU)
    assert phases.timed("a", lambda: time.sleep(0.02) or "done") == "done"
    assert 1.02 <= phases.seconds["a"] < 2 and phases.seconds["b"] == 0


class Device:
    """Its clock ticks once for each event it reaches, and it reaches none before it is waited for."""

    def __init__(self) -> None:
        self.queue: list[Event] = []
        self.now, self.waits = 0, 0

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.reached = device, -1

    def record(self) -> None:
        self.device.queue.append(self)

    def synchronize(self) -> None:
        self.device.waits += 1
        for each in self.device.queue:
            self.device.now += 1
            each.reached = self.device.now
        self.device.queue = []

    def elapsed_time(self, other: Event) -> float:
        assert self.reached > 0 < other.reached, "asked before the device was there"
        return 1000.0 * (other.reached - self.reached)


def test_on_a_gpu_no_phase_waits_and_events_tell_the_seconds() -> None:
    device = Device()
    phases = Phases({"a": 0.0, "b": 0.0}, CPU, device.event)
    for phase in ("a", "b", "a"):
        assert phases.timed(phase, lambda: 7) == 7
    assert device.waits == 0 and phases.seconds == {"a": 0.0, "b": 0.0}
    phases.settle()
    assert phases.seconds == {"a": 2.0, "b": 1.0}
    phases.timed("b", lambda: None)
    phases.settle()
    phases.settle()
    assert phases.seconds == {"a": 2.0, "b": 2.0}
