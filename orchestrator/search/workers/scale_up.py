"""Growth of a search onto nodes that are added while it runs.

Worker groups are started on the new nodes, and Tune runs more trials at a time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from orchestrator.cluster.nodes import nodes
from orchestrator.cluster.ray_threads import RayThread, await_end
from orchestrator.search.workers.placement import Placement, room_for_groups

log = logging.getLogger(__name__)

LOOK_S = 5.0


class ScaleUp(RayThread):
    """A thread that looks for room that was not there at the start, until ``stop`` is called.

    ``most`` is the number of groups that have enough trials. ``start(number)`` starts a further
    group and gets the number of groups including it. A node that went and came back does not count
    as new room, since its group comes back by itself.
    """

    def __init__(self, placement: Placement, most: int, start: Callable[[int], None]) -> None:
        super().__init__("cluster-growth")
        self._placement = placement
        self._most = most
        self._start = start
        self._room = room_for_groups(placement, nodes())
        self._over = threading.Event()

    def run(self) -> None:
        groups = self._placement.workers
        while not self._over.wait(LOOK_S):
            try:
                room = room_for_groups(self._placement, nodes())
            except Exception as error:
                # The cluster is unreachable, briefly or for good; the workers' threads handle that.
                log.debug("the nodes can't be counted: %s", error)
                continue
            while (
                groups < min(self._most, self._placement.workers + room - self._room)
                and not self._over.is_set()
            ):
                groups += 1
                self._start(groups)

    def stop(self, seconds: float) -> None:
        """Start no further group, and wait up to ``seconds`` for the thread to end."""
        self._over.set()
        await_end([self], seconds)
