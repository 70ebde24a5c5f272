"""A pool of Ray actors that loses no work unit when actors or nodes die, and does not wait for stragglers.

Ray's own `ActorPool` drops units when an actor dies, and unlimited retries never end on a unit that kills its
actor. Here, a unit in flight on a dead actor is redone elsewhere, and one that fails `MAX_TRIES` times is set
aside and named.

An actor has one unit at a time, so no unit queues behind another. When none is left, an idle actor runs a late unit a
second time; the first to finish wins, and nobody waits for the other. So a unit may run twice, even at the same time:
its result must depend only on the unit, and be the return value of `run` or an atomically published file.
"""

from __future__ import annotations

import math
import re
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pairvpr.distributed.metrics import bytes_of, count_failure
from pairvpr.errors import IncompleteRunError
from pairvpr.machine import in_a_line
from pairvpr.terminal import say

Unit = TypeVar("Unit")

MAX_TRIES = 3
MAX_TRIES_WITH_NODES = 10
SECONDS_TO_NOTICE_A_DEAD_NODE = 20.0
LATE_FACTOR = 2.0
"""A unit is late when it has run for this many times the median of the finished units, ..."""
SECONDS_BEFORE_LATE = 5.0
"""... and at least for this long."""
WAIT_S = 5.0
SECONDS_BETWEEN_VERDICTS = 0.5
SECONDS_BEFORE_COMPLAINT = 30.0


class PoolActor:
    """Base of the pool's actors: `run(unit)` returns something small once the unit's result is safe.

    Another actor may run the same unit at the same time, and an actor may be killed while it repeats one.
    """

    def node_id(self) -> str:
        """The node that it runs on; the pool's first call, answered when the actor is ready."""
        return ray.get_runtime_context().get_node_id()

    def run(self, unit: Any) -> Any:
        """Run one unit."""
        raise NotImplementedError

    def work(self, unit: Any, step: str) -> Any:
        """The same, with its bytes counted for the step."""
        with bytes_of(step):
            return self.run(unit)


class Transport(Protocol):
    """All that the pool asks of Ray, beside the calls of its actors; `benchmarks/simulate_cluster.py` has another."""

    def now_s(self) -> float:
        """A clock that never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...

    def ended(self, refs: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        """The first of the calls that has ended; none if that takes too long."""
        ...

    def result(self, ref: Any) -> Any:
        """What a call that ended returned. Raises `RayError`: what it raised, or that its actor died."""
        ...

    def kill(self, actor: Any) -> None:
        """End an actor, dead or alive."""
        ...

    def live_nodes(self) -> set[str]:
        """The ids of nodes that are not known to be dead."""
        ...

    def resources(self) -> Any:
        """What the cluster has, for a message."""
        ...


class _Ray:
    """Ray itself."""

    def now_s(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def ended(self, refs: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        return ray.wait(list(refs), num_returns=1, timeout=timeout_s)[0]

    def result(self, ref: Any) -> Any:
        return ray.get(ref)

    def kill(self, actor: Any) -> None:
        ray.kill(actor)

    def live_nodes(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def resources(self) -> Any:
        return ray.cluster_resources()


@dataclass
class _Member:
    """An actor and the unit `key` that it has been running since `since_s`; `ref` is its next result.

    Without a `key` it is starting, idle, or busy with a unit that another actor has finished: its outcome is ignored.
    """

    actor: Any
    ref: Any
    node_id: str | None = None
    key: int | None = None
    since_s: float = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it has started and has nothing to do."""
        return self.ref is None

    def send(self, key: int, unit: Any, step: str, now_s: float) -> None:
        """Give it its next unit."""
        self.ref, self.key, self.since_s = self.actor.work.remote(unit, step), key, now_s

    def free(self) -> None:
        """Note that its unit has ended."""
        self.ref = self.key = None


@dataclass(frozen=True)
class _Suspect:
    """Why a unit failed last, and until when Ray may still report that its node died."""

    reason: str
    until_s: float


@dataclass
class _Work(Generic[Unit]):
    """The state of one call of `run`: all units, those waiting to be sent, and the outcomes of the others.

    `failures` has the node on which a unit's actor died, or None for an exception in the unit.
    """

    units: Mapping[int, Unit]
    queue: deque[int]
    failures: dict[int, list[str | None]] = field(default_factory=dict)
    suspects: dict[int, _Suspect] = field(default_factory=dict)
    """Failed units that no actor runs, and that are neither queued again nor set aside yet."""
    failed: dict[int, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Seconds of each finished unit, in order."""

    @property
    def is_over(self) -> bool:
        """Whether every unit is done or has failed for good."""
        return len(self.seconds) + len(self.failed) == len(self.units)

    def seconds_before_late(self) -> float:
        """Seconds after which a unit is late."""
        if not self.seconds:
            return math.inf
        middle = len(self.seconds) - 1
        median = (self.seconds[middle // 2] + self.seconds[(middle + 1) // 2]) / 2
        return max(SECONDS_BEFORE_LATE, LATE_FACTOR * median)


class SupervisedPool(Generic[Unit]):
    """`num_actors` actors made by `make_actor`, replaced when they die. Use as a context manager.

    Without `second_tries`, a unit is sent to one actor only, as long as that actor lives.
    """

    def __init__(
        self,
        make_actor: Callable[[], Any],
        num_actors: int,
        what: str,
        *,
        second_tries: bool = True,
        transport: Transport | None = None,
    ) -> None:
        self._transport: Transport = transport or _Ray()
        self._make_actor = make_actor
        self._what = what
        self._second_tries = second_tries
        self._members = [self._new_member() for _ in range(num_actors)]
        self._failed_starts = 0

    def __enter__(self) -> SupervisedPool[Unit]:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            self._transport.kill(member.actor)

    def run(self, units: Mapping[int, Unit], on_done: Callable[[int, Any], None]) -> dict[int, str]:
        """Run all units; `on_done(key, result)` is called once for each finished one, in no fixed order.

        Returns the error of each unit that failed `MAX_TRIES` times and that no actor runs any more. A unit fails if it
        raises an exception or its actor dies while it runs, unless the actor's whole node died.
        """
        work = _Work(units, deque(units))
        while not work.is_over:
            self._judge(work)
            self._send(work)
            for member, answer in self._answers(in_suspense=bool(work.suspects)):
                if member.node_id is None:
                    self._start(member, answer)
                else:
                    self._hear(member, answer, work, on_done)
        return work.failed

    def _new_member(self) -> _Member:
        actor = self._make_actor()
        return _Member(actor, actor.node_id.remote())

    def _members_at(self, key: int) -> list[_Member]:
        return [member for member in self._members if member.key == key]

    def _send(self, work: _Work[Unit]) -> None:
        """Send a unit to every idle actor, but not to actors that may never start."""
        for member in self._members:
            if member.is_idle:
                key = work.queue.popleft() if work.queue else self._late(work)
                if key is None:
                    return
                member.send(key, work.units[key], self._what, self._transport.now_s())

    def _late(self, work: _Work[Unit]) -> int | None:
        """The unit that has been late longest and has no second try yet."""
        if not self._second_tries:
            return None
        began_before_s = self._transport.now_s() - work.seconds_before_late()
        running = Counter(member.key for member in self._members)
        late = [
            member
            for member in self._members
            if member.key is not None
            and member.since_s <= began_before_s
            and running[member.key] == 1
            and len(work.failures.get(member.key, ())) < MAX_TRIES
        ]
        if not late:
            return None
        say(f"{self._what}: a unit is late, so an idle actor runs it, too")
        return min(late, key=lambda member: member.since_s).key

    def _answers(self, *, in_suspense: bool) -> list[tuple[_Member, Any]]:
        """Actors that are ready or whose unit has ended; waits for some seconds, fewer if `in_suspense`."""
        awaited = {member.ref: member for member in self._members if member.ref is not None}
        timeout_s = WAIT_S if any(member.node_id for member in self._members) else SECONDS_BEFORE_COMPLAINT
        if in_suspense:
            timeout_s = SECONDS_BETWEEN_VERDICTS
        if not awaited:
            self._transport.sleep(timeout_s)
            return []
        answered = self._transport.ended(list(awaited), timeout_s)
        if not answered and not in_suspense and not any(member.node_id for member in self._members):
            say(f"{self._what}: still no actor could start; the cluster has {self._transport.resources()}")
        return [(awaited[ref], ref) for ref in answered]

    def _start(self, member: _Member, answer: Any) -> None:
        """Record an actor's node. An actor that can't start is retried, then left out while others work."""
        try:
            member.node_id = self._transport.result(answer)
            member.free()
            self._failed_starts = 0
        except RayError as error:
            count_failure(self._what, "actor")
            self._failed_starts += 1
            if self._failed_starts < MAX_TRIES * len(self._members):
                self._replace(member)
            elif any(other.node_id for other in self._members):
                say(f"{self._what}: continuing with one actor fewer, which can't start: {_reason(error)}")
                self._members.remove(member)
            else:
                raise IncompleteRunError(f"{self._what}: no actor can start: {_reason(error)}") from error

    def _hear(
        self,
        member: _Member,
        answer: Any,
        work: _Work[Unit],
        on_done: Callable[[int, Any], None],
    ) -> None:
        """Handle the end of an actor's unit: it is done, is retried, or has failed for good."""
        key, seconds = member.key, self._transport.now_s() - member.since_s
        try:
            result = self._transport.result(answer)
        except RayError as error:
            member.free()
            count_failure(self._what, "unit" if isinstance(error, RayTaskError) else "actor")
            if not isinstance(error, RayTaskError):
                say(f"{self._what}: an actor died; another one redoes its unit")
                self._replace(member)
            if key is not None:
                self._blame(key, None if isinstance(error, RayTaskError) else member.node_id, error, work)
            return
        member.free()
        if key is None:
            return
        for other in self._members_at(key):
            other.key = None
        insort(work.seconds, seconds)
        self._send(work)  # the actor continues while the result is processed
        on_done(key, result)

    def _blame(self, key: int, node_id: str | None, error: RayError, work: _Work[Unit]) -> None:
        """Handle a failed unit; `node_id` is set if its actor died. While another actor runs it, wait."""
        work.failures.setdefault(key, []).append(node_id)
        if not self._members_at(key):
            seconds = SECONDS_TO_NOTICE_A_DEAD_NODE if node_id is not None else 0.0
            work.suspects[key] = _Suspect(_reason(error), self._transport.now_s() + seconds)

    def _replace(self, member: _Member) -> None:
        # An unreachable actor may still be alive, and would work alongside its replacement.
        self._transport.kill(member.actor)
        self._members[self._members.index(member)] = self._new_member()

    def _judge(self, work: _Work[Any]) -> None:
        """Queue the suspects again; set aside those that failed `MAX_TRIES` times by their own fault, or far too often.

        An actor's death is not the unit's fault if the whole node died. Ray notices that some seconds later; until then
        the unit waits, and the others continue.
        """
        if not work.suspects:
            return
        alive = self._transport.live_nodes()
        for key, suspect in list(work.suspects.items()):
            failures = work.failures[key]
            own = sum(node is None or node in alive for node in failures)
            if len(failures) < MAX_TRIES_WITH_NODES and own < MAX_TRIES:
                work.queue.appendleft(key)
            elif len(failures) >= MAX_TRIES_WITH_NODES or self._transport.now_s() >= suspect.until_s:
                work.failed[key] = suspect.reason
            else:
                continue
            del work.suspects[key]


def _reason(error: RayError) -> str:
    """One line: the exception of a unit or of an actor's start (Ray puts it last), or why an actor died."""
    if isinstance(error, RayTaskError):
        return in_a_line(error.cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    in_actor = lines and re.match(r"[\w.]*(Error|Exception)\b", lines[-1])
    return lines[-1] if in_actor else f"{type(error).__name__}: {lines[0] if lines else ''}"
