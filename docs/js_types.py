"""client/js/worker-wan-lora.d.ts, from the same schemas as docs/openapi.json."""

from __future__ import annotations

import json
from typing import Any

Schema = dict[str, Any]

_HEAD = """\
// Written by `python -m docs.generate` from the worker's schema.

"""
_CLIENT = """\
export interface Update extends Partial<Progress> {
  status: JobStatus;
}

export interface Options {
  /** Seconds without an answer until the client gives up; 1800 at an endpoint, 60 at a local API. */
  patience?: number;
  /** Seconds between two looks at a job; 1. */
  pause?: number;
}

export interface Waiting {
  onProgress?: (update: Update) => void;
  /** Ends the waiting, not the job. */
  signal?: AbortSignal;
}

export class ClientError extends Error {
  /** One word: the code of the worker, or of this client, such as UNREACHABLE or SUBMISSION_UNKNOWN. */
  code: string;
  jobId?: string;
}

export class Client {
  static endpoint(id: string, key: string, options?: Options & { baseUrl?: string }): Client;
  static local(url?: string, options?: Options): Client;
  run(input: Request, options?: Waiting): Promise<Result>;
  submit(input: Request, options?: { signal?: AbortSignal }): Promise<string>;
  wait(jobId: string, options?: Waiting): Promise<Result>;
  status(jobId: string): Promise<Status>;
  cancel(jobId: string): Promise<JobStatus>;
  health(): Promise<Health>;
}
"""


def declarations(openapi: str) -> str:
    """TypeScript declarations of the schemas in an OpenAPI document, and of the client."""
    schemas: dict[str, Schema] = json.loads(openapi)["components"]["schemas"]
    return _HEAD + "\n".join(_declared(name, schema) for name, schema in schemas.items()) + "\n" + _CLIENT


def _declared(name: str, schema: Schema) -> str:
    if "properties" not in schema:
        return f"export type {name} = {_type(schema)};\n"
    required = schema.get("required", [])
    lines = [f"export interface {name} {{"]
    for field, one in schema["properties"].items():
        if text := one.get("description"):
            lines.append(f"  /** {text.replace('*/', '')} */")
        lines.append(f"  {field}{'' if field in required else '?'}: {_type(one)};")
    return "\n".join([*lines, "}\n"])


_NAMES = {"string": "string", "integer": "number", "number": "number", "boolean": "boolean", "null": "null"}


def _type(schema: Schema) -> str:
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_NAMES[one] for one in kind)
    if kind == "array":
        inner = _type(schema.get("items", {}))
        return f"Array<{inner}>"
    if kind == "object" or kind is None:
        fields = schema.get("properties")
        if fields:
            required = schema.get("required", [])
            return (
                "{ "
                + "; ".join(f"{name}{'' if name in required else '?'}: {_type(one)}" for name, one in fields.items())
                + " }"
            )
        more = schema.get("additionalProperties")
        return f"Record<string, {_type(more) if isinstance(more, dict) and more else 'unknown'}>" if kind else "unknown"
    return _NAMES[kind]
