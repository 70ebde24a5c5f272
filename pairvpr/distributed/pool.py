"""A pool of Ray actors that loses no work unit when actors or nodes die.

Ray's own `ActorPool` drops units when an actor dies, and endless retries never end on a unit that kills its
actor. Here a unit in flight on a dead actor is done again elsewhere, and one that fails `MAX_TRIES` times is set
aside and named.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pairvpr.distributed.progress import say
from pairvpr.errors import IncompleteRunError

Unit = TypeVar("Unit")

MAX_TRIES = 3
MAX_TRIES_WITH_NODES = 10
SECONDS_TO_NOTICE_A_DEAD_NODE = 20.0
UNITS_IN_FLIGHT = 2
WAIT_S = 5.0
SECONDS_BEFORE_COMPLAINT = 30.0


class PoolActor:
    """Base of the pool's actors: `run(unit)` returns something small once the unit's result is safe."""

    def node_id(self) -> str:
        """The node it lives on; the first call, answered when the actor is ready for work."""
        return ray.get_runtime_context().get_node_id()

    def run(self, unit: Any) -> Any:
        """Do one unit."""
        raise NotImplementedError


@dataclass
class _Member:
    """An actor and what it was sent; units run in the order they were sent."""

    actor: Any
    ready: ray.ObjectRef[str]
    node_id: str | None = None
    in_flight: deque[tuple[ray.ObjectRef[Any], int]] = field(default_factory=deque)

    def awaited(self) -> ray.ObjectRef[Any] | None:
        """What it owes next: word that it is ready, then the oldest unit."""
        if self.node_id is None:
            return self.ready
        return self.in_flight[0][0] if self.in_flight else None


class SupervisedPool(Generic[Unit]):
    """`num_actors` actors made by `make_actor`, replaced when they die. Use as a context manager."""

    def __init__(self, make_actor: Callable[[], Any], num_actors: int, what: str) -> None:
        self._make_actor = make_actor
        self._what = what
        self._members = [self._new_member() for _ in range(num_actors)]
        self._failed_starts = 0

    def __enter__(self) -> SupervisedPool[Unit]:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            ray.kill(member.actor)

    def run(self, units: Mapping[int, Unit], on_done: Callable[[int, Any], None]) -> dict[int, str]:
        """Do every unit; `on_done(key, result)` is called as each is done, in no fixed order.

        Returns the error of each unit that failed `MAX_TRIES` times. A unit's failure is an exception in it or
        the death of its actor while it ran, unless the actor's whole node went away.
        """
        queue = deque(units)
        failures: dict[int, list[str | None]] = {}
        failed: dict[int, str] = {}
        while queue or any(member.in_flight for member in self._members):
            self._send(units, queue)
            for member in self._members_that_answered():
                if member.node_id is None:
                    self._start(member)
                    continue
                ref, key = member.in_flight[0]
                try:
                    result = ray.get(ref)
                except RayError as error:
                    failures.setdefault(key, []).append(self._failed(member, error, queue))
                    if _is_hopeless(failures[key]):
                        failed[key] = _reason(error)
                    else:
                        queue.appendleft(key)
                else:
                    member.in_flight.popleft()
                    on_done(key, result)
        return failed

    def _new_member(self) -> _Member:
        actor = self._make_actor()
        return _Member(actor, actor.node_id.remote())

    def _send(self, units: Mapping[int, Unit], queue: deque[int]) -> None:
        """Fill up the actors that are ready, evenly; nothing is sent to one that may never start."""
        for _ in range(UNITS_IN_FLIGHT):
            for member in self._members:
                if queue and member.node_id is not None and len(member.in_flight) < UNITS_IN_FLIGHT:
                    key = queue.popleft()
                    member.in_flight.append((member.actor.run.remote(units[key]), key))

    def _members_that_answered(self) -> list[_Member]:
        awaited = {ref: member for member in self._members if (ref := member.awaited()) is not None}
        timeout_s = WAIT_S if any(member.node_id for member in self._members) else SECONDS_BEFORE_COMPLAINT
        answered, _ = ray.wait(list(awaited), num_returns=1, timeout=timeout_s)
        if not answered and not any(member.node_id for member in self._members):
            say(f"{self._what}: still no actor could start; the cluster has {ray.cluster_resources()}")
        return [awaited[ref] for ref in answered]

    def _start(self, member: _Member) -> None:
        """Note where an actor lives. One that can't start is tried again, then left out while others work."""
        try:
            member.node_id = ray.get(member.ready)
            self._failed_starts = 0
        except RayError as error:
            self._failed_starts += 1
            if self._failed_starts < MAX_TRIES * len(self._members):
                self._replace(member)
            elif any(other.node_id for other in self._members):
                say(f"{self._what}: goes on with an actor less, one can't start: {_reason(error)}")
                self._members.remove(member)
            else:
                raise IncompleteRunError(f"{self._what}: no actor can start: {_reason(error)}") from error

    def _failed(self, member: _Member, error: RayError, queue: deque[int]) -> str | None:
        """Take the failed unit off its actor; a dead actor is replaced. Returns the node it died on, if it died."""
        member.in_flight.popleft()
        if isinstance(error, RayTaskError):
            return None
        queue.extendleft(key for _, key in reversed(member.in_flight))
        say(f"{self._what}: an actor died; its unit is done again elsewhere")
        self._replace(member)
        return member.node_id

    def _replace(self, member: _Member) -> None:
        # An actor that can't be reached may still be alive, and would go on working beside its replacement.
        ray.kill(member.actor)
        self._members[self._members.index(member)] = self._new_member()


def _is_hopeless(failures: Sequence[str | None]) -> bool:
    """Whether a unit failed `MAX_TRIES` times by its own fault, or far too often.

    `failures` has None for an exception, else the node that its actor died on. A death is not the unit's fault if the
    whole node went, which Ray notices some seconds later: the last word is waited for.
    """
    if len(failures) >= MAX_TRIES_WITH_NODES:
        return True
    deadline_s = time.monotonic() + SECONDS_TO_NOTICE_A_DEAD_NODE
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        if sum(node is None or node in alive for node in failures) < MAX_TRIES:
            return False
        if failures[-1] is None or time.monotonic() > deadline_s:
            return True
        time.sleep(0.5)


def _reason(error: RayError) -> str:
    """One line: the exception of a unit, or of an actor's start (Ray puts that last), or why an actor died."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    in_actor = lines and re.match(r"[\w.]*(Error|Exception)\b", lines[-1])
    return lines[-1] if in_actor else f"{type(error).__name__}: {lines[0] if lines else ''}"
