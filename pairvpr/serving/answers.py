"""From what Localizers found to the JSON of an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pairvpr import located
from pairvpr.config.serve_schema import TOGETHER
from pairvpr.data.utm import UtmZone
from pairvpr.localizer import Localizer
from pairvpr.located import Located
from pairvpr.serving import schema
from pairvpr.serving.service import Wanted
from pairvpr.where import Utm


def answer_of(
    request_id: str, wanted: Wanted, found: Mapping[str, Located], localizers: Mapping[str, Localizer], total_s: float
) -> schema.Answer:
    """The answer of the indices that were asked; candidates of several stand in the order of their pair scores."""
    pairs = [(name, match) for name, answer in found.items() for match in answer.matches]
    if wanted.name == TOGETHER:
        pairs = sorted(pairs, key=lambda pair: -_score(pair[1]))[: wanted.k]
    generations = {name: answer.generation for name, answer in found.items()}
    of = {name: localizers[name].opened.index_digest for name in found}
    candidates = [_candidate(rank, name, of[name], match, found[name]) for rank, (name, match) in enumerate(pairs, 1)]
    best = found[pairs[0][0]] if pairs else None
    confidence = None if best is None else best.confidence
    in_map = None if best is None else best.in_map
    if wanted.min_confidence is not None and confidence is not None:
        in_map = confidence >= wanted.min_confidence
    is_answer = bool(candidates) and in_map is not False and candidates[0].pair_score is not None
    any_of = localizers[wanted.names[0]]
    return schema.Answer(
        request_id=request_id,
        index=wanted.name,
        generation=None if wanted.name == TOGETHER else generations[wanted.name],
        generations=generations,
        model=model_of(any_of),
        pair_model=pair_model_of(any_of),
        answer=candidates[0] if is_answer else None,
        in_map=in_map,
        confidence=confidence,
        position=None if best is None or best.position is None else _position(best.position, best.zone),
        candidates=candidates,
        seconds=_seconds(found, total_s),
    )


def _candidate(rank: int, name: str, of: str, match: located.Match, answer: Located) -> schema.Candidate:
    score = match.pair_score
    return schema.Candidate(
        rank=rank,
        index=name,
        photo_id=match.database_id,
        path=match.path,
        latitude=match.latitude,
        longitude=match.longitude,
        utm=None if match.utm is None else _utm(match.utm, answer.zone),
        heading_deg=match.heading_deg,
        squared_distance=match.squared_distance,
        pair_score=score if score is not None and math.isfinite(score) else None,
        confidence=match.confidence,
        photo=f"/v1/photos/{match.database_id}?index={name}&generation={answer.generation}&of={of}",
    )


def _score(match: located.Match) -> float:
    return -math.inf if match.pair_score is None else match.pair_score


def _position(estimate: located.Estimate, zone: UtmZone | None) -> schema.Position:
    return schema.Position(
        latitude=estimate.latitude,
        longitude=estimate.longitude,
        utm=_utm(estimate.utm, zone),
        spread_m=estimate.spread_m,
    )


def _utm(position: Utm, zone: UtmZone | None) -> schema.Utm:
    return schema.Utm(
        zone=None if zone is None else zone.number,
        is_south=None if zone is None else zone.south,
        east_m=position.east_m,
        north_m=position.north_m,
    )


def _seconds(found: Mapping[str, Located], total_s: float) -> schema.Seconds:
    """The photo was decoded and described once, and searched in each index."""
    each = [answer.seconds for answer in found.values()]
    return schema.Seconds(
        decode=each[0].decode,
        describe=each[0].describe,
        search=sum(one.search for one in each),
        rerank=sum(one.rerank for one in each),
        total=total_s,
    )


def model_of(localizer: Localizer) -> schema.Model:
    """The network that made an index."""
    model = localizer.opened.manifest.model
    return schema.Model(name=model["name"], weights_sha256=model["weights_sha256"])


def pair_model_of(localizer: Localizer) -> schema.Model:
    """The network that scores pairs."""
    return schema.Model(name=localizer.network.name, weights_sha256=localizer.weights_sha256)


def index_of(name: str, localizer: Localizer) -> schema.Index:
    """What is known of an index."""
    opened = localizer.opened
    zone = opened.map.zone
    return schema.Index(
        name=name,
        num_photos=opened.manifest.num_live,
        generation=opened.number,
        kind=opened.manifest.kind,
        model=model_of(localizer),
        pair_model=pair_model_of(localizer),
        has_positions=opened.has_positions,
        utm_zone=None if zone is None else f"{zone.number}{'S' if zone.south else 'N'}",
        calibrated=localizer.is_calibrated,
        decision=localizer.decision,
    )
