"""Places of workers on a cluster, found out by reserving them: what Ray lists may be busy, leaving, or lost some seconds ago."""

import time
from collections.abc import Iterable, Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

# A node that answers does so within some milliseconds.
ANSWER_S = 2.0
PATIENCE_S = 30.0
POLL_S = 0.05


class Places:
    """Reservations for workers. Those that find no place stand as a demand that an autoscaler sees.

    bundle: what a worker needs. least: so many are reserved at once or not at all, and the others after them: two runs that wait
    never hold half of what each of them needs. most: all together. A context manager: all are given back at its end.
    """

    def __init__(self, bundle: Mapping[str, float], least: int, most: int) -> None:
        self._bundle, self._least, self._more = dict(bundle), least, most - least
        self._first = [placement_group([self._bundle] * least)] if least else []
        self._others: list[PlacementGroup] | None = None

    def __enter__(self) -> "Places":
        return self

    def __exit__(self, *_: object) -> None:
        for group in [*self._first, *(self._others or [])]:
            remove_placement_group(group)

    def ready(self) -> int:
        """How many have found a place."""
        if not all(_is_made(group) for group in self._first):
            return 0
        if self._others is None:
            self._others = [placement_group([self._bundle]) for _ in range(self._more)]
        return self._least + sum(_is_made(group) for group in self._others)


def reserved() -> frozenset[str]:
    """All reservations of this command, Ray Train's included, by Ray's ids."""
    job = ray.get_runtime_context().get_job_id()
    table: dict[str, dict[str, object]] = placement_group_table()
    # An id ends with that of the job that it was made in.
    return frozenset(group for group, about in table.items() if group.endswith(job) and about["state"] != "REMOVED")


def give_back(groups: Iterable[str]) -> None:
    """Removes reservations by their ids, and with them what still runs there."""
    for group in groups:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def lost(nodes: Iterable[str]) -> set[str]:
    """Those of the nodes that no longer answer, or take no more work because they will be taken away. nodes: Ray's ids.

    The head itself notices a dead node only after several missed heartbeats: 10 s and more.
    """
    here = ray.get_runtime_context().get_node_id()
    # Of memory there is always a byte, whatever the workers hold.
    asked = {node: placement_group([{"memory": 1}], bundle_label_selector=[{"ray.io/node-id": node}]) for node in {here, *nodes}}
    try:
        return _silent(asked, here)
    finally:
        for group in asked.values():
            remove_placement_group(group)


def leaving() -> frozenset[str]:
    """The nodes that will be taken away, by Ray's ids: spot nodes after a notice, or `ray drain-node`."""
    # Ray has no public name for it; its own Ray Train asks so.
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return frozenset(found)


def _silent(asked: Mapping[str, PlacementGroup], here: str) -> set[str]:
    """Those that have not answered by some time after this node, which lives, has: on a busy machine everything takes longer."""
    began, heard = time.monotonic(), None
    while silent := {node for node, group in asked.items() if not _is_made(group)}:
        now = time.monotonic()
        heard = now if heard is None and here not in silent else heard
        if now - began >= PATIENCE_S or (heard is not None and now - heard >= ANSWER_S):
            break
        time.sleep(POLL_S)
    return silent


def _is_made(group: PlacementGroup) -> bool:
    found: dict[str, object] = placement_group_table(group)
    return found["state"] == "CREATED"
