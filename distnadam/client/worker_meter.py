"""What one worker measures: its calls, and how often its bytes go each way."""

from distnadam.backends.base import WorkerChannel
from distnadam.client.gradient_buffer import GradientBuffer
from distnadam.metrics.meter import Meter, Traffic
from distnadam.tensors.layout import Layout


class WorkerMeter:
    """One worker's part of its process's meter.

    Args:
        meter: the process's.
        layout: the model's.
    """

    def __init__(self, meter: Meter, layout: Layout) -> None:
        self._meter = meter
        self._layout = layout
        self._traffic = Traffic({}, {})
        self._traffic_of: tuple[object, object] = (None, None)

    def pulled(self, seconds: float, channel: WorkerChannel, buffer: GradientBuffer) -> None:
        """Count a pull that took so long."""
        self._meter.pull.add(seconds)
        self._by_present_routes(channel, buffer).pulled += 1

    def pushed(self, seconds: float, channel: WorkerChannel, buffer: GradientBuffer) -> None:
        """Count a push that took so long."""
        self._meter.push.add(seconds)
        self._by_present_routes(channel, buffer).pushed += 1

    def stepped(self, seconds: float) -> None:
        """Count a whole step, behind its push."""
        self._meter.step.add(seconds)
        self._traffic.pulled += 1

    def _by_present_routes(self, channel: WorkerChannel, buffer: GradientBuffer) -> Traffic:
        """Return the counters of pushes and pulls by the present routes."""
        routes, flat = channel.routes, buffer.flat
        if self._traffic_of[0] is not routes or self._traffic_of[1] is not flat:
            self._traffic_of = (routes, flat)
            self._traffic = (
                Traffic({}, {})
                if routes is None
                else Traffic.of(
                    routes.ranges, routes.shared, routes.objects, flat, self._layout.pull_dtypes
                )
            )
            self._meter.traffic.append(self._traffic)
        return self._traffic
