"""sleep: waits; for trying cancel and timeouts."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tower.handler import TaskContext, handler


class SleepPayload(BaseModel):
    """How long to wait."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"seconds": 5}]})

    seconds: float = Field(ge=0, le=86_400, description="Seconds to wait.")


@handler("sleep", payload=SleepPayload)
def sleep(payload: SleepPayload, task: TaskContext) -> dict[str, Any]:
    """Wait for some seconds, saying so once a second; for trying cancel and timeouts."""
    left = payload.seconds
    while left > 0:
        task.log(f"{left:g} s to go")
        task.wait(min(left, 1.0))
        left = round(left - 1.0, 3)
    return {"slept_s": payload.seconds}
