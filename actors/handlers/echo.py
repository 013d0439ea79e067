"""echo: returns its payload."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from tower.handler import TaskContext, handler


class EchoPayload(BaseModel):
    """Anything."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [{"hello": "tower"}]})


@handler("echo", payload=EchoPayload, timeout_s=60)
def echo(payload: EchoPayload, task: TaskContext) -> dict[str, Any]:
    """Return the payload; for trying the way a task travels."""
    task.log("echo")
    return payload.model_dump()
