"""GET /v1/models, /health and /metrics."""

from __future__ import annotations

from fastapi import Request as HttpRequest
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from minicpm.serve.api_error import ApiError
from minicpm.serve.json_reply import JsonReply
from minicpm.serve.replies import HealthReply, ModelCard, ModelList
from minicpm.serve.service import Service


def _card(service: Service) -> ModelCard:
    config = service.model.config
    meta = {
        "model_type": config.model_type,
        "num_parameters": config.num_parameters().total,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "dtypes": service.model.dtypes,
        "has_eyes": False,
    }
    return ModelCard(
        id=service.settings.model_name,
        object="model",
        created=service.created,
        owned_by="minicpm",
        max_model_len=service.model.context_length,
        meta=meta,
    )


async def list_models(service: Service, request: HttpRequest) -> Response:
    """The one model that is served."""
    return JsonReply(ModelList(object="list", data=[_card(service)]))


async def show_model(service: Service, request: HttpRequest) -> Response:
    """The model of that name.

    Raises:
        ApiError: there is none.
    """
    name = request.path_params["model"]
    if name != service.settings.model_name:
        raise ApiError(404, f"the model {name[:100]!r} is not served here", code="model_not_found", param="model")
    return JsonReply(_card(service))


async def tell_health(service: Service, request: HttpRequest) -> Response:
    """Whether requests are answered.

    Raises:
        ApiError: the engine's thread has ended.
    """
    if not service.engine.is_alive:
        raise ApiError(503, "the engine does not run", code="engine_stopped")
    return JsonReply(HealthReply(status="ok"))


async def tell_metrics(service: Service, request: HttpRequest) -> Response:
    """Counters and gauges for Prometheus."""
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})
