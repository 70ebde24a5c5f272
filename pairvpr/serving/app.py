"""The routes: `create_app` makes the FastAPI app around a `Service`. It knows no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from pairvpr import __version__
from pairvpr.config.serve_schema import OWN_MACHINE
from pairvpr.deadline import Deadline
from pairvpr.serving import schema
from pairvpr.serving.answers import answer_of, index_of
from pairvpr.serving.body import PHOTO, read_body
from pairvpr.serving.door import ARRIVED_S, LOG, REQUEST_ID, Door, error_body, error_headers, place_of
from pairvpr.serving.errors import RequestError
from pairvpr.serving.page import page
from pairvpr.serving.pictures import thumbnail, why
from pairvpr.serving.service import Service
from pairvpr.terminal import say

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Error, "description": what}
    for status, what in (
        (400, "The request can't be parsed or breaks off, or has a token in its address."),
        (401, "The token is wrong or missing."),
        (403, "The service answers this machine alone, and the header Host or Origin names another host."),
        (404, "No such index or photo."),
        (408, "The body came too slowly."),
        (413, "The body is too large, or has too many photos."),
        (415, "Not an image."),
        (422, "The image is broken or too large, or a parameter is wrong."),
        (503, "Too many requests wait, or the index can't be read; see Retry-After."),
        (504, "The time for the request is over; its work was stopped."),
    )
}
REFUSED: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403)}
"""What every route but `/healthz` may answer."""
PHOTO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [PHOTO],
                    "properties": {PHOTO: {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}
PHOTOS_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [PHOTO],
                    "properties": {PHOTO: {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}
Parameters = Annotated[schema.LocateParameters, Query()]
IndexName = Annotated[str | None, Query(max_length=schema.MOST_TEXT, description="Name of the index.")]
GenerationNumber = Annotated[
    int | None, Query(ge=1, le=2**53, description="Of the answer that named the photo; ids of photos never change.")
]
OfIndex = Annotated[
    str | None,
    Query(max_length=schema.MOST_TEXT, description="Digest of the index, as answers have it; of another one: 404."),
]
PhotoId = Annotated[int, Query(ge=0, le=2**53, description="`photo_id` of a candidate.")]


def create_app(service: Service, token: str | None = None, *, sends_request_id: bool = True) -> FastAPI:
    """The app: what it answers is in `/docs`. With a `token`, requests must carry it.

    Without one, and without `serve.allow_anonymous`, it answers requests to 127.0.0.1, ::1 and localhost alone.

    A proxy that sends the header X-Request-Id itself, with the id that it gave the request, wants `sends_request_id`
    false.
    """
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs-files",
        title="pairvpr",
        version=__version__,
        description="A photo in, a place out: visual place recognition.",
        lifespan=_lifespan(service),
        dependencies=[Depends(HTTPBearer(auto_error=False))],
    )
    app.add_middleware(
        Door,  # pyright: ignore[reportArgumentType]
        token=token,
        service=service,
        sends_request_id=sends_request_id,
    )
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _no_route)
    _locate_routes(app, service)
    _index_routes(app, service, token)
    _health_routes(app, service)
    _page_route(app)
    return app


def _locate_routes(app: FastAPI, service: Service) -> None:
    async def answered(
        request: Request, photo: bytes, asked: schema.LocateParameters, deadline: Deadline
    ) -> schema.Answer:
        wanted = await service.wanted(asked, deadline)
        found = await service.locate(photo, wanted, deadline)
        total_s = time.monotonic() - request.scope[ARRIVED_S]
        service.metrics.seconds.labels("total").observe(total_s)
        return answer_of(request.scope[REQUEST_ID], wanted, found, service.localizers, total_s)

    @app.post("/v1/locate", responses=ERRORS, openapi_extra=PHOTO_BODY)
    async def locate(request: Request, parameters: Parameters) -> schema.Answer:
        """Where was this photo taken? The body is an image, or a form with the part `photo`."""
        service.answering.check()
        body = await read_body(request, service.settings)
        asked = _with_fields(parameters, body.fields)
        service.metrics.photos.observe(len(body.photos))
        async with _until_gone(request, service) as deadline:
            return await answered(request, _only(body.photos), asked, deadline)

    @app.post("/v1/locate/batch", responses=ERRORS, openapi_extra=PHOTOS_BODY)
    async def locate_batch(request: Request, parameters: Parameters) -> schema.Answers:
        """Where was each of these photos taken? The body is a form with several parts `photo`."""
        service.answering.check()
        body = await read_body(request, service.settings)
        asked = _with_fields(parameters, body.fields)
        service.metrics.photos.observe(len(body.photos))
        answers: list[schema.Answer | schema.Error] = []
        async with _until_gone(request, service) as deadline:
            await service.wanted(asked, deadline)
            for photo in body.photos:
                try:
                    answers.append(await answered(request, photo, asked, deadline))
                except RequestError as error:
                    answers.append(schema.Error.model_validate(error_body(request.scope[REQUEST_ID], error)))
        return schema.Answers(request_id=request.scope[REQUEST_ID], answers=answers)

    @app.post("/v1/why", responses=ERRORS, openapi_extra=PHOTO_BODY)
    async def explain(
        request: Request,
        photo_id: PhotoId,
        index: IndexName = None,
        generation: GenerationNumber = None,
        of: OfIndex = None,
    ) -> schema.Why:
        """Where does the pair decoder look in this photo and in a photo of the index?"""
        service.check_index(index, of)
        service.answering.check()
        photo = _only((await read_body(request, service.settings)).photos)
        async with _until_gone(request, service) as deadline:
            return await why(service, index, photo_id, photo, deadline)


def _index_routes(app: FastAPI, service: Service, token: str | None) -> None:
    @app.get("/v1/index", responses=REFUSED)
    async def indices() -> schema.Indices:
        """The indices behind this service."""
        return schema.Indices(indices=[index_of(*each) for each in service.localizers.items()])

    @app.get(
        "/v1/photos/{photo_id}",
        responses={200: {"content": {"image/webp": {}}}, **ERRORS},
        response_class=Response,
    )
    async def photo(
        request: Request,
        photo_id: int,
        index: IndexName = None,
        generation: GenerationNumber = None,
        of: OfIndex = None,
    ) -> Response:
        """A small picture of a photo of the index."""
        service.check_index(index, of)
        async with _until_gone(request, service) as deadline:
            picture = await thumbnail(service, index, photo_id, deadline)
        return Response(picture, media_type="image/webp", headers={"Cache-Control": "private, max-age=3600"})

    @app.post("/v1/refresh", responses=ERRORS)
    async def refresh() -> schema.Refreshed:
        """Switch to the newest generation of each index, without failing a request."""
        if token is None and (service.settings.allow_anonymous or service.settings.host not in OWN_MACHINE):
            raise RequestError(401, "unauthorized", "a refresh wants the token, and this service has none")
        changed = await service.refresh()
        return schema.Refreshed(generations=service.generations, changed=changed)


def _health_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """Alive."""
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, responses=REFUSED | {503: ERRORS[503]})
    async def readyz() -> str:
        """Weights and shards are there."""
        if not await asyncio.to_thread(service.ready):
            raise RequestError(503, "not_ready", "weights or shards are not there yet", 1)
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse, responses=REFUSED)
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page_route(app: FastAPI) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def root() -> HTMLResponse:
        text, headers = page()
        return HTMLResponse(text, headers=headers)


def _lifespan(service: Service) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        refreshing = asyncio.create_task(_refresh_often(service))
        try:
            yield
        finally:
            refreshing.cancel()
            await asyncio.to_thread(service.close)

    return lifespan


async def _refresh_often(service: Service) -> None:
    while service.settings.refresh_s is not None:
        await asyncio.sleep(service.settings.refresh_s)
        try:
            for name in await service.refresh():
                say(f"index {name}: generation {service.generations[name]} is served now")
        except RequestError:
            pass  # said by the service; the next try may find the index whole
        except Exception as error:  # a bug, which must not end the looking
            LOG.error("refresh: bug in the program: %s", place_of(error))


@asynccontextmanager
async def _until_gone(request: Request, service: Service) -> AsyncIterator[Deadline]:
    """The request's deadline, which is over as soon as the client is gone."""
    waited_s = time.monotonic() - request.scope[ARRIVED_S]
    deadline = Deadline(max(0.0, service.settings.timeout_s - waited_s))

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        deadline.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield deadline
    finally:
        watching.cancel()


def _with_fields(parameters: schema.LocateParameters, fields: dict[str, str]) -> schema.LocateParameters:
    """The parameters of the query string and those of the form. Raises `RequestError` for one in both."""
    given = parameters.model_dump(exclude_unset=True)
    twice = sorted(given.keys() & fields.keys())
    if twice:
        raise RequestError(422, "bad_parameter", f"{twice[0]} is given twice; expected it once")
    try:
        return schema.LocateParameters.model_validate({**given, **fields})
    except ValidationError as error:
        raise _bad_parameter(error.errors()[0]) from error


def _only(photos: list[bytes]) -> bytes:
    if len(photos) != 1:
        message = f"{len(photos)} parts `{PHOTO}`; expected one (several: /v1/locate/batch)"
        raise RequestError(422, "bad_parameter", message)
    return photos[0]


def _bad_parameter(problem: Any) -> RequestError:
    """One line of what pydantic found first; what the client sent is not repeated."""
    name = str(problem["loc"][-1]) if problem["loc"] else "request"
    name = "".join(char if char.isprintable() else "?" for char in name)[:64]
    message = "no such parameter" if problem["type"] == "extra_forbidden" else str(problem["msg"])
    return RequestError(422, "bad_parameter", f"{name}: {message[:1].lower()}{message[1:]}")


def _refused(request: Request, error: Any) -> JSONResponse:
    return JSONResponse(error_body(request.scope[REQUEST_ID], error), error.status, error_headers(error))


def _invalid(request: Request, error: Any) -> JSONResponse:
    return _refused(request, _bad_parameter(error.errors()[0]))


def _no_route(request: Request, error: Any) -> JSONResponse:
    codes = {404: "not_found", 405: "method_not_allowed"}
    status = error.status_code
    found = RequestError(status, codes.get(status, "bad_request"), f"{error.detail}; see /docs")
    response = _refused(request, found)
    response.headers.update(error.headers or {})
    return response
