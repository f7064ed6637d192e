"""The local API, and with a key RunPod's, as OpenAPI 3.1: the calls that this project's client makes.

The request is that of worker/request.py. The answers are written here; a test holds real ones against them.
"""

from __future__ import annotations

import json
from typing import Any

from client.client import BASE_URL, LOCAL_URL
from worker.errors import MEANING
from worker.request import Request

Schema = dict[str, Any]


def document() -> str:
    """docs/openapi.json."""
    request = Request.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = request.pop("$defs")
    described = {
        "openapi": "3.1.0",
        "info": {
            "title": "worker-wan-lora",
            "version": "1",
            "description": "Videos of Wan 2.1 and 2.2 with LoRAs of ai-toolkit. The same calls on a worker's own machine "
            "(`python handler.py --rp_serve_api`, without a key) and at a RunPod endpoint.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [
            {"url": LOCAL_URL, "description": "A worker's local API."},
            {
                "url": f"{BASE_URL}/{{endpoint_id}}",
                "description": "A RunPod Serverless endpoint.",
                "variables": {"endpoint_id": {"default": "ENDPOINT_ID"}},
            },
        ],
        "security": [{}, {"runpod": []}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {"runpod": {"type": "http", "scheme": "bearer", "description": "RUNPOD_API_KEY"}},
            "schemas": {"Request": request, **parts, **_answers()},
        },
    }
    return json.dumps(described, indent=2, ensure_ascii=False) + "\n"


def _paths() -> Schema:
    job_id = {"name": "job_id", "in": "path", "required": True, "schema": {"type": "string"}}
    body = {"required": True, "content": _json("Job")}
    return {
        "/run": {"post": _call("run", "Start a job.", "Status", requestBody=body)},
        "/runsync": {"post": _call("runSync", "Start a job and wait for its end.", "Status", requestBody=body)},
        "/status/{job_id}": {"get": _call("getStatus", "How far a job is.", "Status", parameters=[job_id])},
        "/cancel/{job_id}": {"post": _call("cancel", "Stop a job.", "Status", parameters=[job_id])},
        "/health": {"get": _call("getHealth", "The workers and their jobs.", "Health")},
    }


def _call(name: str, summary: str, answer: str, **more: Any) -> Schema:
    responses: Schema = {"200": {"description": "The answer.", "content": _json(answer)}}
    if "parameters" in more:
        responses["404"] = {"description": "There is no such job."}
    return {"operationId": name, "summary": summary, **more, "responses": responses}


def _json(name: str) -> Schema:
    return {"application/json": {"schema": _ref(name)}}


def _answers() -> Schema:
    integer: Schema = {"type": "integer"}
    text: Schema = {"type": "string"}
    number: Schema = {"type": "number"}
    located = {"url": text, "expires_at": {"type": ["string", "null"]}, "key": text}
    located |= {"width": integer, "height": integer, "bytes": integer}
    video = {"prompt_index": integer, **located, "format": {"enum": ["mp4", "webp", "gif", "png"]}}
    video |= {"num_frames": integer, "fps": integer, "seed": integer}
    numbered: Schema = {"video_index": {**integer, "description": "Among the videos of a prompt with several."}}
    pictures = {name: {"anyOf": [_ref("Picture"), {"type": "null"}]} for name in ("poster", "contact_sheet")}
    stages = ["fetch", "wait", "load", "denoise", "encode", "upload"]
    counts = ("running", "idle", "ready", "initializing", "throttled", "unhealthy")
    return {
        "Job": _object({"input": _ref("Request")}),
        "Status": _object(
            {"id": text, "status": _ref("JobStatus")},
            output={"description": "While it runs, its progress; when it is done, the result.", **_any("Progress", "Result")},
            error={
                "type": "string",
                "pattern": "^[A-Z_]+: ",
                "description": f"`CODE: …`, with one of {', '.join(code.value for code in MEANING)}.",
            },
        ),
        "JobStatus": {"enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]},
        "Progress": _object(
            {
                "stage": {"enum": stages},
                "prompt_index": integer,
                "prompts": integer,
                "step": integer,
                "steps": integer,
                "percent": {**integer, "description": "Of the denoising."},
                "seconds_left": {"type": ["number", "null"], "description": "Until the denoising ends."},
            }
        ),
        "Result": _object(
            {
                "model": text,
                "outputs": _object({"images": _list(_ref("Video")), "videos": _list(_ref("Video"))}),
                "warnings": _list(text),
                "settings": {"type": "object", "additionalProperties": True, "description": "All that decided the frames."},
                "timings": {
                    "type": "object",
                    "additionalProperties": number,
                    "description": "Seconds by stage, `total`, and of a draft `full_run_estimate`.",
                },
            },
            errors=_list(_object({"prompt_index": integer, "code": text, "message": text}, **numbered)),
        ),
        "Video": _object(video, **numbered, **pictures),
        "Picture": _object(located),
        "Health": _object(
            {
                "workers": {"type": "object", "properties": dict.fromkeys(counts, integer)},
                "jobs": {"type": "object", "additionalProperties": integer},
            },
            model={**text, "description": "The model that is served; a local API alone tells it."},
        ),
    }


def _object(required: Schema, **optional: Schema) -> Schema:
    return {"type": "object", "properties": {**required, **optional}, "required": [*required]}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _any(*names: str) -> Schema:
    return {"anyOf": [_ref(name) for name in names]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
