"""Where a photo was taken, from the GPS entries of its EXIF block."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from PIL.ExifTags import GPS, IFD

from pairvpr.data.images import FORMATS, opened
from pairvpr.data.photo_metadata import with_exif_alone

NUM_HEAD_BYTES = 1 << 17
"""A JPEG's EXIF block of at most 64 KiB is at its beginning, so this much is enough for nearly all files."""

_WGS84 = ("", "WGS84", "WGS1984", "EPSG:4326")


class GpsError(Exception):
    """A photo has no usable position in its EXIF; the message says why."""


@dataclass(frozen=True)
class GpsPosition:
    """WGS84 degrees, without a range check. The heading is clockwise from true north; NaN if unknown."""

    latitude_deg: float
    longitude_deg: float
    heading_deg: float


def gps_position(data: bytes) -> GpsPosition:
    """The position from a photo's bytes, or the first of them. Raises `GpsError`; more bytes may help."""
    try:
        with opened(with_exif_alone(data)) as image:
            entries = image.getexif().get_ifd(IFD.GPSInfo)
    except Exception as error:  # Pillow raises nearly anything on foreign bytes
        raise GpsError(
            f"can't be opened ({type(error).__name__}): not a photo, or truncated; expected a complete "
            f"{', '.join(FORMATS)} file file with GPSLatitude and GPSLongitude in its EXIF"
        ) from error
    needed = (GPS.GPSLatitude, GPS.GPSLatitudeRef, GPS.GPSLongitude, GPS.GPSLongitudeRef)
    missing = [tag.name for tag in needed if tag not in entries]
    if missing:
        raise GpsError(f"its EXIF has no GPS position, or a damaged one; expected {', '.join(missing)}")
    _check_datum(entries)
    latitude_deg = _degrees(entries, GPS.GPSLatitude, GPS.GPSLatitudeRef, "NS")
    longitude_deg = _degrees(entries, GPS.GPSLongitude, GPS.GPSLongitudeRef, "EW")
    if latitude_deg == longitude_deg == 0.0:
        raise GpsError(
            "GPSLatitude and GPSLongitude are both 0, which cameras write without a GPS fix; expected a position"
        )
    return GpsPosition(latitude_deg, longitude_deg, _heading_deg(entries))


def _check_datum(entries: dict[int, Any]) -> None:
    """Refuse other datums: their degrees are up to several hundred metres off in WGS 84."""
    datum = entries.get(GPS.GPSMapDatum, "")
    text = _text(datum)
    if text is None or re.sub(r"[ _-]", "", text.upper()) not in _WGS84:
        raise GpsError(f"GPSMapDatum is {_quoted(datum)}; expected WGS-84 or nothing")


def _degrees(entries: dict[int, Any], tag: GPS, reference_tag: GPS, sides: str) -> float:
    """Degrees, minutes and seconds as one number, positive towards the first of `sides`."""
    value, reference = entries[tag], _text(entries[reference_tag])
    parts = [_number(part) for part in value] if isinstance(value, tuple) and len(value) == 3 else []
    if not parts or not all(math.isfinite(part) for part in parts):
        raise GpsError(f"{tag.name} is {_quoted(value)}; expected degrees, minutes and seconds")
    if min(parts) < 0.0:
        raise GpsError(
            f"{tag.name} is {_quoted(value)}; expected no sign, because {reference_tag.name} gives the hemisphere"
        )
    if max(parts[1:]) > 60.0:  # 60 itself comes from rounding 59.9999
        raise GpsError(f"{tag.name} is {_quoted(value)}; expected at most 60 minutes and 60 seconds")
    if any(part % 1.0 and any(parts[i + 1 :]) for i, part in enumerate(parts)):
        raise GpsError(f"{tag.name} is {_quoted(value)}; expected a fraction only in the last part")
    if reference is None or reference.upper() not in tuple(sides):
        raise GpsError(f"{reference_tag.name} is {_quoted(entries[reference_tag])}; expected {sides[0]} or {sides[1]}")
    degrees = parts[0] + parts[1] / 60 + parts[2] / 3600
    return degrees if reference.upper() == sides[0] else -degrees


def _heading_deg(entries: dict[int, Any]) -> float:
    """From 0 to below 360; NaN if it is missing, or not relative to true north."""
    is_true_north = (_text(entries.get(GPS.GPSImgDirectionRef)) or "").upper() == "T"
    return _number(entries.get(GPS.GPSImgDirection)) % 360.0 if is_true_north else math.nan


def _text(value: object) -> str | None:
    """ASCII text without padding; None for anything else."""
    try:
        text = value.decode("ascii") if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None
    return text.strip("\0 ") if isinstance(text, str) else None


def _number(value: Any) -> float:
    """The value as a number; NaN if it is not one, is infinite, or divides by zero."""
    if isinstance(value, str | bytes):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, ArithmeticError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _quoted(value: Any) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, tuple) else repr(value)
