"""Requests and answers as JSON. Every field says its unit; `/docs` shows them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NUMBER = "-?[0-9]+(?:[.][0-9]+)?(?:[eE][+-]?[0-9]+)?"
NEAR = rf"^{NUMBER},{NUMBER}$"
BOX = rf"^{NUMBER},{NUMBER},{NUMBER},{NUMBER}$"
MOST_TEXT = 200


class LocateParameters(BaseModel):
    """How to search, in the query string or as fields beside the photo."""

    model_config = ConfigDict(extra="forbid")

    index: Annotated[
        str | None, Field(max_length=MOST_TEXT, description="Name of the index; `*` asks all; default: the only one.")
    ] = None
    k: Annotated[int, Field(ge=1, le=10_000, description="Number of candidates to return.")] = 5
    num_candidates: Annotated[
        int | None,
        Field(ge=1, le=100_000, description="Number of photos to re-rank; default and most: the service's setting."),
    ] = None
    near: Annotated[
        str | None,
        Field(
            pattern=NEAR, max_length=MOST_TEXT, description="LATITUDE,LONGITUDE in degrees (WGS84), with `radius_m`."
        ),
    ] = None
    radius_m: Annotated[
        float | None, Field(gt=0, le=1e8, description="Search photos at most this many metres from `near`.")
    ] = None
    box: Annotated[
        str | None,
        Field(pattern=BOX, max_length=MOST_TEXT, description="SOUTH,WEST,NORTH,EAST in degrees (WGS84)."),
    ] = None
    heading_deg: Annotated[
        float | None,
        Field(ge=-360, le=360, description="Viewing direction in degrees clockwise from north, with `within_deg`."),
    ] = None
    within_deg: Annotated[
        float | None,
        Field(gt=0, le=360, description="Search photos whose heading differs by at most this many degrees."),
    ] = None
    min_confidence: Annotated[
        float | None,
        Field(ge=0, le=1, description="Answer null below this probability; the service needs a calibration."),
    ] = None


class Utm(BaseModel):
    """A position in a UTM zone."""

    zone: Annotated[int | None, Field(description="1 to 60; null: the index does not know its zone.")]
    is_south: Annotated[bool | None, Field(description="Whether the zone is in the southern hemisphere.")]
    east_m: Annotated[float, Field(description="Metres east in the zone.")]
    north_m: Annotated[float, Field(description="Metres north in the zone.")]


class Position(BaseModel):
    """Where the photo was taken, as estimated from the photos near the best candidate."""

    latitude: Annotated[float | None, Field(description="Degrees (WGS84); null: the UTM zone is unknown.")]
    longitude: Annotated[float | None, Field(description="Degrees (WGS84); null: the UTM zone is unknown.")]
    utm: Utm
    spread_m: Annotated[
        float, Field(description="Root mean square distance of these photos from it in metres; 0 of a single one.")
    ]


class Candidate(BaseModel):
    """A photo of the index that may show the same place."""

    rank: Annotated[int, Field(description="1 = best.")]
    index: Annotated[str, Field(description="Name of its index.")]
    photo_id: Annotated[int, Field(description="Its number in the index.")]
    path: Annotated[str, Field(description="Its name, relative to the folder of the index's photos.")]
    latitude: Annotated[float | None, Field(description="Degrees (WGS84); null if unknown.")]
    longitude: Annotated[float | None, Field(description="Degrees (WGS84); null if unknown.")]
    utm: Annotated[Utm | None, Field(description="Null if its position is unknown.")]
    heading_deg: Annotated[
        float | None, Field(description="Viewing direction in degrees clockwise from north; null if unknown.")
    ]
    squared_distance: Annotated[
        float, Field(description="Squared distance of the two global descriptors, which have unit length (0 to 4).")
    ]
    pair_score: Annotated[
        float | None,
        Field(
            description="Sum of both directions' logits, higher = more likely the same place; null: not scored: "
            "scoring stopped early, or the photo of the index can't be read or has changed."
        ),
    ]
    confidence: Annotated[
        float | None, Field(description="Probability (0 to 1) of being right if it were the answer; null if unknown.")
    ]
    photo: Annotated[str, Field(description="Where its thumbnail is, relative to this service.")]


class Model(BaseModel):
    """A network."""

    name: Annotated[str, Field(description="Its name.")]
    weights_sha256: Annotated[str, Field(description="SHA-256 of its weights, hexadecimal.")]


class Seconds(BaseModel):
    """How long each step took, in seconds."""

    decode: Annotated[float, Field(description="Photo to pixels, in seconds.")]
    describe: Annotated[float, Field(description="Pixels to descriptor, in seconds.")]
    search: Annotated[float, Field(description="Descriptor to candidates, in seconds.")]
    rerank: Annotated[float, Field(description="Scoring of the candidates, in seconds.")]
    total: Annotated[float, Field(description="From the arrival of the request to its answer, in seconds.")]


class Answer(BaseModel):
    """The answer for one photo. All of it belongs to one generation of each index."""

    request_id: Annotated[str, Field(description="Also in the log and in the header X-Request-Id.")]
    index: Annotated[str, Field(description="Name of the index that was asked; `*`: all of them.")]
    generation: Annotated[int | None, Field(description="Generation of the index; null where several were asked.")]
    generations: Annotated[dict[str, int], Field(description="Generation of each index that was asked, by name.")]
    model: Annotated[Model, Field(description="The network that describes photos; it made the index.")]
    pair_model: Annotated[
        Model,
        Field(description="The network that scores pairs: `model`, unless a network of your own describes photos."),
    ]
    answer: Annotated[
        Candidate | None, Field(description="The best candidate; null if there is none, or it is not in the map.")
    ]
    in_map: Annotated[
        bool | None,
        Field(
            description="Whether the confidence reaches `min_confidence` or the service's threshold; null without one."
        ),
    ]
    confidence: Annotated[
        float | None, Field(description="Probability (0 to 1) that the best candidate is right; null if unknown.")
    ]
    position: Annotated[Position | None, Field(description="Null if the best candidate has no known position.")]
    candidates: Annotated[list[Candidate], Field(description="Best first, at most `k`.")]
    seconds: Seconds


class ErrorDetail(BaseModel):
    """Why there is no answer."""

    code: Annotated[str, Field(description="For programs: broken_image, busy, ...")]
    message: Annotated[str, Field(description="For people: one line.")]
    request_id: Annotated[str, Field(description="Also in the log and in the header X-Request-Id.")]


class Error(BaseModel):
    """No answer."""

    error: ErrorDetail


class Answers(BaseModel):
    """The answer for each photo of a batch, in their order. Each photo is answered as if it were alone."""

    request_id: Annotated[str, Field(description="Also in the log and in the header X-Request-Id.")]
    answers: Annotated[
        list[Answer | Error], Field(description="An error stands in the place of a photo without answer.")
    ]


class Why(BaseModel):
    """Where the pair decoder looks in the two photos, as pictures to lay over them."""

    query: Annotated[str, Field(description="Overlay of the query photo: a data: URI of a WebP picture.")]
    photo: Annotated[str, Field(description="Overlay of the index's photo: a data: URI of a WebP picture.")]
    pair_score: Annotated[float, Field(description="Sum of both directions' logits.")]


class Index(BaseModel):
    """An index behind this service."""

    name: Annotated[str, Field(description="What the parameter `index` calls it.")]
    num_photos: Annotated[int, Field(description="Number of photos that can be found.")]
    generation: Annotated[int, Field(description="The open generation.")]
    kind: Annotated[str, Field(description="Kind of the index, such as flat or ivf_rabitq.")]
    model: Annotated[Model, Field(description="The network that describes photos; it made the index.")]
    pair_model: Annotated[
        Model,
        Field(description="The network that scores pairs: `model`, unless a network of your own describes photos."),
    ]
    has_positions: Annotated[bool, Field(description="Whether positions of its photos are known.")]
    utm_zone: Annotated[str | None, Field(description="UTM zone, such as 10N; null if unknown.")]
    calibrated: Annotated[bool, Field(description="Whether answers have a confidence.")]
    decision: Annotated[str, Field(description="What orders the candidates: pair, fused or consensus.")]


class Indices(BaseModel):
    """The indices behind this service."""

    indices: list[Index]


class Refreshed(BaseModel):
    """The generation of each index after the refresh."""

    generations: Annotated[dict[str, int], Field(description="By name.")]
    changed: Annotated[list[str], Field(description="Names of the indices whose generation is another one now.")]
