"""tinker's endpoints of downloads: a checkpoint's files by URL."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import StreamingResponse

from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.sessions import Caller


async def external_weights_urls(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """URLs of a checkpoint's files, by their names."""
    words = request.path_params
    path = f"tinker://{words['run_id']}/{words['checkpoint_id']}"
    trainer, checkpoint = await gateway.models.find_checkpoint(path, caller.key)
    token, offer = gateway.downloads.offer(trainer, caller.key, checkpoint)
    base = f"{request.base_url}api/v1/external_files/{token}/"
    return {
        "urls": {file.name: base + quote(file.name) for file in checkpoint.files},
        "expires": datetime.fromtimestamp(offer.expires_s, UTC).isoformat(),
    }


async def external_file(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """One of those files. Whoever has the URL may."""
    offer = gateway.downloads.find(request.path_params["token"])
    file = offer.file(request.path_params["file"])
    pieces = offer.read(file)
    # What is refused is refused before anything of it is sent.
    first = await anext(pieces, b"")

    async def content() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    headers = {"content-length": str(file.size_bytes)}
    return StreamingResponse(content(), media_type="application/octet-stream", headers=headers)
