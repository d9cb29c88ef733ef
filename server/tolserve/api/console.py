"""The console: one page at `/`, its files under `/console/`. Static, without secrets, so open without the key."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import Response

from tolserve.api.errors import ApiError

FOLDER = Path(__file__).with_name("console_page")
INDEX = "index.html"

# Written out, not looked up: the system's own list of types may be missing or wrong, and browsers refuse a module
# that does not come as JavaScript.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Nothing from elsewhere, nothing inline, no frame around the page. uPlot sets styles through the DOM, which is allowed.
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; frame-src 'none'; "
    "object-src 'none'; worker-src 'none'"
)
_HEADERS = {
    # A browser keeps the files and asks each time whether they changed: right after an upgrade, and 304s otherwise.
    "cache-control": "no-cache",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _File:
    body: bytes
    media_type: str
    etag: str


def _load(folder: Path) -> dict[str, _File]:
    """Every file by its path below the folder. They are 100 KB together; what is not in here does not exist, so no
    path of a request ever reaches the file system."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TYPES:
            body = path.read_bytes()
            etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
            files[path.relative_to(folder).as_posix()] = _File(body, _TYPES[path.suffix], etag)
    return files


_FILES: Mapping[str, _File] = _load(FOLDER)


@router.get("/")
async def page(if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """The page itself."""
    return _answer(INDEX, if_none_match)


@router.get("/console/{name:path}")
async def file(name: str, if_none_match: Annotated[str | None, Header()] = None) -> Response:
    """A file of the page. 404 for any other name."""
    return _answer(name, if_none_match)


def _answer(name: str, known: str | None) -> Response:
    if (found := _FILES.get(name)) is None:
        raise ApiError(404, "the console has no such file")
    headers = _HEADERS | {"etag": found.etag}
    if known is not None and found.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(found.body, headers=headers, media_type=found.media_type)
