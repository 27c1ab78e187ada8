"""What the page shows about the server and its model."""

import dataclasses
from collections import Counter

from starlette.requests import Request
from starlette.responses import Response

from mistral.model import Mistral
from mistral.quantization.packed import Packed
from mistral.sampling import Sampling
from mistral.server.http import Json
from mistral.server.service import Service


async def about(service: Service, request: Request, limit: int) -> Response:
    """GET /page/about."""
    config = service.engine.config
    window = service.window
    settings = request.app.state.app.settings
    return Json(
        {
            "name": service.name,
            "format": service.jobs.format,
            "engine": window.engine or type(service.engine).__name__,
            "quantization": _type_of_weights(window.model),
            "window": config.sliding_window,
            "slots": service.engine.batch_size,
            "limit": service.engine.limit,
            "vocab_size": config.vocab_size,
            "parameters": config.num_parameters,
            "bytes": _num_bytes(window.model),
            "chat": {"has_tools": service.jobs.chat.has_tools},
            "sampling": dataclasses.asdict(Sampling()),
            "needs_key": settings.api_key is not None,
            "token": window.token,
            "tools": window.tools.about(),
            "questions": [list(question) for question in window.questions],
            "inside": service.inside is not None,
        },
        headers={"Cache-Control": "no-store"},
    )


def _type_of_weights(model: Mistral | None) -> str | None:
    """The quantization type that most weights have, Q4_K for example; else the model's dtype."""
    if model is None:
        return None
    sizes: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, Packed):
            sizes[module.kind.name] += module.num_rows * module.row_bytes
    return sizes.most_common(1)[0][0] if sizes else str(model.dtype).removeprefix("torch.")


def _num_bytes(model: Mistral | None) -> int | None:
    """Of the weights in memory."""
    if model is None:
        return None
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    in_blocks = sum(module.num_rows * module.row_bytes for module in packed)
    return in_blocks + sum(parameter.nbytes for parameter in model.parameters())
