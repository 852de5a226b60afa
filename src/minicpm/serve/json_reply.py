"""`JsonReply`: an answer's model as JSON; fields that say nothing are left out only where OpenAI leaves them out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response


class JsonReply(Response):
    """The JSON of a pydantic model; what was never set is left out, what was set to None is null."""

    media_type = "application/json"

    def __init__(self, reply: BaseModel, headers: Any = None) -> None:
        """Encode `reply`."""
        text = reply.model_dump_json(exclude_unset=True)
        super().__init__(text, headers={"cache-control": "no-store", **(headers or {})})
