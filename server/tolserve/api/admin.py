"""Routes that change the running server. They exist for holders of the API key alone: without one, for nobody."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from tolserve.api.errors import ApiError
from tolserve.api.schemas import CacheRequest, ReopenRequest
from tolserve.api.state import Server, server_of


async def admitted(server: Annotated[Server, Depends(server_of)]) -> Server:
    """The state, for a server that can be changed. Raises 403, 404 and 503."""
    if not server.settings.asks_for_key:
        raise ApiError(
            403,
            "this server has no API key, so nobody may change it; start it with --api-key or --api-key-file",
            code="no_api_key",
        )
    if server.require_ready().encoding is None:
        raise ApiError(404, "this model has no table", code="no_table")
    return server


router = APIRouter()
Admitted = Annotated[Server, Depends(admitted)]


@router.post("/v1/tol/cache")
async def resize(body: CacheRequest, server: Admitted) -> dict[str, Any]:
    """Change the tiers' sizes while requests run; answers those in force. The options' come back with a restart."""
    sizes = await server.engine.resize(body.device_cache, body.host_cache)
    return asdict(sizes)


@router.post("/v1/tol/table/reopen")
async def reopen(server: Admitted, body: ReopenRequest | None = None) -> dict[str, Any]:
    """Go on with the table that lies at the table's path now; answers what `table inspect` says of it."""
    facts = await server.engine.reopen()
    return {name: value for name, value in facts.items() if name != "path"}  # no answer says where files lie
