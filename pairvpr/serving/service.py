"""Answers requests with Localizers: which index, how long, how many at once, which generation."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pairvpr.config.schema import DecisionRule
from pairvpr.config.serve_schema import TOGETHER, ServeSettings
from pairvpr.data import storage
from pairvpr.deadline import Deadline, TooLateError
from pairvpr.errors import PhotoError, UserError, UserNetworkError
from pairvpr.localizer import Localizer, answer_together
from pairvpr.located import Located
from pairvpr.serving.body import broken, check_photo
from pairvpr.serving.errors import RequestError, not_described, not_found, too_late, unavailable
from pairvpr.serving.limits import Gate
from pairvpr.serving.metrics import Metrics
from pairvpr.serving.schema import LocateParameters
from pairvpr.where import TooFarError, Where

T = TypeVar("T")
LOG = logging.getLogger("pairvpr.serving")
PICTURES_AT_ONCE, MOST_WAITING_PICTURES = 2, 64


@dataclass(frozen=True)
class Wanted:
    """What a request asks: indices that can answer it, in order of their names, and how."""

    name: str
    names: tuple[str, ...]
    k: int
    num_candidates: int | None
    where: Where
    min_confidence: float | None


class Service:
    """The indices behind one door. Its methods run in the door's event loop.

    All localizers share one network. `ready` says whether what is elsewhere can be reached.
    """

    def __init__(
        self,
        localizers: Mapping[str, Localizer],
        settings: ServeSettings,
        metrics: Metrics,
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        self.localizers = dict(sorted(localizers.items()))
        self.settings, self.metrics, self.ready = settings, metrics, ready
        self.max_megapixels = min(
            settings.max_megapixels, *(each.network.max_megapixels for each in self.localizers.values())
        )
        self.answering = Gate(settings.num_at_once, settings.max_waiting, "answer")
        self.picturing = Gate(PICTURES_AT_ONCE, MOST_WAITING_PICTURES, "picture")
        self._refreshing = asyncio.Lock()
        self.num_open, self.is_draining = 0, False
        metrics.watch(
            {
                "open_requests": ("Requests that are open.", lambda: self.num_open),
                "waiting_requests": ("Photos that wait for a thread.", lambda: self.answering.num_waiting),
                "running_requests": (
                    "Photos that are being answered.",
                    lambda: self.answering.num_inside - self.answering.num_waiting,
                ),
            }
        )
        self._say_generations()

    async def wanted(self, asked: LocateParameters, deadline: Deadline) -> Wanted:
        """What the parameters ask. Raises `RequestError` (404, 422, 504) for what no index here can answer in time."""
        looking = asyncio.to_thread(self._wanted, asked)  # conditions look at every position of an index
        try:
            return await asyncio.wait_for(looking, deadline.left_s)
        except TimeoutError as error:
            raise too_late() from error

    def _wanted(self, asked: LocateParameters) -> Wanted:
        name, names = self._names(asked.index)
        where = _where(asked)
        can, too_far = [], None
        for each in names:
            localizer = self.localizers[each]
            if asked.min_confidence is not None and not localizer.is_calibrated:
                raise _bad(f"min_confidence: the index {each} has no calibration; expected a service with one")
            if len(names) > 1 and localizer.decision is not DecisionRule.pair:
                raise _bad("index=*: answers are ordered by a fitted decision, which no other index shares; name one")
            try:
                localizer.check(k=asked.k, num_candidates=asked.num_candidates, where=where)
                can.append(each)
            except TooFarError as error:
                too_far = error
            except UserError as error:
                raise _bad(str(error)) from error
        if not can and too_far is not None:
            raise _bad(str(too_far)) from too_far
        return Wanted(name, tuple(can), asked.k, asked.num_candidates, where, asked.min_confidence)

    def localizer(self, name: str | None) -> Localizer:
        """The one index of this name. Raises `RequestError` (404, 422)."""
        name, names = self._names(name)
        if len(names) > 1:
            raise _bad(f"index={name}: a photo belongs to one index; expected one of {', '.join(names)}")
        return self.localizers[name]

    def check_index(self, name: str | None, digest: str | None) -> None:
        """Raise `RequestError` (404) unless the index of this name is the one that an earlier answer was from."""
        if digest is not None and digest != self.localizer(name).opened.index_digest:
            raise not_found(f"of={_short(digest)}: the service has another index under this name")

    def _names(self, name: str | None) -> tuple[str, tuple[str, ...]]:
        names = tuple(self.localizers)
        if name == TOGETHER and len(names) > 1:
            return TOGETHER, names
        if name is None and len(names) > 1:
            raise _bad(f"index: several are served; expected one of {', '.join(names)}, or {TOGETHER}")
        if name is None or name == TOGETHER:
            name = next(iter(self.localizers))
        if name not in names:
            raise not_found(f"index={_short(name)}: expected one of {', '.join(names)}")
        return name, (name,)

    async def locate(self, photo: bytes, wanted: Wanted, deadline: Deadline) -> dict[str, Located]:
        """The answer of each index that was asked. Raises `RequestError`."""
        localizers = [self.localizers[name] for name in wanted.names]

        def work() -> list[Located]:
            check_photo(photo, self.max_megapixels)
            self._keep(photo)
            return answer_together(
                localizers,
                photo,
                k=wanted.k,
                num_candidates=wanted.num_candidates,
                where=wanted.where,
                deadline=deadline,
            )

        answers = await self.computed(self.answering, work, deadline)
        seconds = answers[0].seconds
        for step, value in (("decode", seconds.decode), ("describe", seconds.describe)):
            self.metrics.seconds.labels(step).observe(value)
        for answer in answers:
            self.metrics.seconds.labels("search").observe(answer.seconds.search)
            self.metrics.seconds.labels("rerank").observe(answer.seconds.rerank)
        return dict(zip(wanted.names, answers, strict=True))

    async def computed(self, gate: Gate, work: Callable[[], T], deadline: Deadline) -> T:
        """The result of `work`, whose errors become `RequestError`."""
        try:
            return await gate.run(work, deadline)
        except TooLateError as error:
            raise too_late() from error
        except PhotoError as error:
            raise broken(error.reason) from error
        except UserNetworkError as error:
            LOG.error("descriptor.module fails on a photo: %s", type(error.__cause__ or error).__name__)
            raise not_described() from error
        except (UserError, OSError, storage.StorageError) as error:
            LOG.warning("an index or its store fails: %s", type(error).__name__)
            raise unavailable() from error

    async def refresh(self) -> list[str]:
        """Open the newest generations beside the old ones and switch to them; returns the names of changed indices.

        Raises `RequestError` (503) if an index could not be switched, after all others were.
        """
        async with self._refreshing:
            changed, failed = [], False
            for name, localizer in self.localizers.items():
                try:
                    if await asyncio.to_thread(localizer.refresh):
                        changed.append(name)
                except (UserError, OSError, storage.StorageError) as error:
                    LOG.warning("refresh of index %s failed: %s; the old generation stays", name, type(error).__name__)
                    failed = True
            self._say_generations()
            if failed:
                raise unavailable()
            return changed

    @property
    def generations(self) -> dict[str, int]:
        """The open generation of each index."""
        return {name: localizer.generation for name, localizer in self.localizers.items()}

    def _say_generations(self) -> None:
        for name, generation in self.generations.items():
            self.metrics.generation.labels(name).set(generation)

    def _keep(self, photo: bytes) -> None:
        if self.settings.keep_photos is not None:
            name = hashlib.sha256(photo).hexdigest()
            storage.write_bytes(storage.join(self.settings.keep_photos, name), photo)

    async def drain(self) -> None:
        """Refuse new requests, and wait until the accepted ones are answered, at most `serve.drain_s`."""
        self.is_draining = True
        deadline = Deadline(self.settings.drain_s)
        while self.num_open and deadline.left_s:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End the threads, after their work."""
        self.answering.close()
        self.picturing.close()


def _where(asked: LocateParameters) -> Where:
    """The conditions. Raises `RequestError` (422)."""
    box = None if asked.box is None else _numbers(asked.box)
    try:
        return Where(
            near=None if asked.near is None else (_numbers(asked.near)[0], _numbers(asked.near)[1]),
            radius_m=asked.radius_m,
            box=None if box is None else ((box[0], box[1]), (box[2], box[3])),
            heading_deg=asked.heading_deg,
            within_deg=asked.within_deg,
        )
    except UserError as error:
        raise _bad(str(error)) from error


def _numbers(text: str) -> Sequence[float]:
    return [float(number) for number in text.split(",")]


def _bad(message: str) -> RequestError:
    return RequestError(422, "bad_parameter", message)


def _short(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)[:64]
