"""POST /v1/embeddings: the mean of the model's last hidden states."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import Request as HttpRequest
from starlette.responses import Response

from minicpm.engine import Request
from minicpm.serve.api_error import ApiError
from minicpm.serve.completions import encode_prompts
from minicpm.serve.fields import EmbeddingRequest
from minicpm.serve.json_reply import JsonReply
from minicpm.serve.replies import EmbeddingReply, EmbeddingUsage, EmbeddingVector
from minicpm.serve.service import Service


async def embed(service: Service, request: HttpRequest) -> Response:
    """Give each text a vector of length 1.

    Raises:
        ApiError: the request is at fault, or too much waits.
    """
    fields = await service.read(request, EmbeddingRequest)
    size = service.model.config.hidden_size
    if fields.dimensions not in (None, size):
        raise ApiError(400, f"vectors of this model have {size} dimensions", param="dimensions")
    prompts = await encode_prompts(service, request, fields.input)
    if not all(prompts):
        raise ApiError(400, "a text to embed must not be empty", param="input")
    group = service.submit(request, [Request(prompt, max_new_tokens=0, pooling="mean") for prompt in prompts])
    await service.answer(request, group)
    data = []
    for index, sequence in enumerate(group.sequences):
        assert sequence.pooled is not None, "a finished sequence has what it wanted"
        vector = (sequence.pooled / max(float(np.linalg.norm(sequence.pooled)), 1e-12)).astype("<f4")
        value = base64.b64encode(vector.tobytes()).decode() if fields.encoding_format == "base64" else vector.tolist()
        data.append(EmbeddingVector(object="embedding", index=index, embedding=value))
    num_tokens = sum(map(len, prompts))
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return JsonReply(EmbeddingReply(object="list", model=service.settings.model_name, data=data, usage=usage))
