"""Generate clients of docs/openapi.json in Python and TypeScript, and let each make a video: `make openapi-clients`.

It is no part of `make test`, since it installs the generators, from PyPI and from npm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

from playground.__main__ import tiny_example, tiny_worker

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/openapi.json"
PYTHON = ["openapi-python-client==0.29.1"]
TYPESCRIPT = ["openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3"]

_PYTHON_USE = """
import json, sys, time
from generated import Client
from generated.api.default import get_health, get_status, run
from generated.models import Job, JobStatus, Result

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
assert get_health.sync(client=client).model == "wan22_14b_t2v"
status = run.sync(client=client, body=Job.from_dict({"input": json.loads(sys.argv[2])}))
while status.status in (JobStatus.IN_QUEUE, JobStatus.IN_PROGRESS):
    time.sleep(0.2)
    status = get_status.sync(status.id, client=client)
assert isinstance(status.output, Result), status
print(status.output.outputs.videos[0].url)
"""

_TYPESCRIPT_USE = """
import createClient from "openapi-fetch";
import type { components, paths } from "./generated";

type Job = components["schemas"]["Job"];
// Only what is required; the rest has defaults.
export const small: Job = { input: { model: "wan21_1b", loras: [{ path: "a.safetensors" }], prompts: [{ prompt: "a boat" }] } };
// @ts-expect-error a misspelt field
export const wrong: Job = { input: { model: "wan21_1b", loras: [], prompts: [{ prompt: "a boat", smaple_steps: 2 }] } };

export async function make(baseUrl: string, job: Job): Promise<string> {
  const client = createClient<paths>({ baseUrl });
  let { data: status } = await client.POST("/run", { body: job });
  while (status && (status.status === "IN_QUEUE" || status.status === "IN_PROGRESS")) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    ({ data: status } = await client.GET("/status/{job_id}", { params: { path: { job_id: status.id } } }));
  }
  if (!status?.output || !("outputs" in status.output)) throw new Error(status?.error ?? "no answer");
  const { settings, outputs } = status.output;
  if (settings["model"] !== job.input.model) throw new Error("another model");
  return outputs.videos[0]!.url;
}
"""


def main(checkpoints: Path) -> None:
    request = json.dumps(tiny_example() | {"prompts": [tiny_example()["prompts"][0] | {"sample_steps": 2}]})
    with TemporaryDirectory() as folder, tiny_worker(checkpoints) as url:
        for name, use in (("Python", _in_python), ("TypeScript", _in_typescript)):
            (Path(folder) / name).mkdir()
            print(f"{name}: {use(Path(folder) / name, url, request)}", flush=True)


def _in_python(folder: Path, url: str, request: str) -> str:
    venv.create(folder / "venv", with_pip=True)
    python = str(folder / "venv/bin/python")
    _run(folder, python, "-m", "pip", "install", "--quiet", *PYTHON)
    options = ["--path", str(DOCUMENT), "--output-path", "generated", "--meta", "none"]
    _run(folder, str(folder / "venv/bin/openapi-python-client"), "generate", *options)
    return _run(folder, python, "-c", _PYTHON_USE, url, request)


def _in_typescript(folder: Path, url: str, request: str) -> str:
    (folder / "package.json").write_text('{"private": true, "type": "module"}')
    (folder / "use.ts").write_text(_TYPESCRIPT_USE)
    _run(folder, "npm", "install", "--silent", "--no-audit", "--no-fund", *TYPESCRIPT)
    # A field with a default may be left out of a request; the generator takes it as always there, unless told otherwise.
    _run(folder, "npx", "openapi-typescript", str(DOCUMENT), "--output", "generated.ts", "--default-non-nullable", "false")
    _run(
        folder, "npx", "tsc", "--strict", "--target", "es2022", "--moduleResolution", "bundler", "--module", "es2022", "use.ts"
    )
    call = f'import {{ make }} from "./use.js"; console.log(await make({json.dumps(url)}, {{ input: {request} }}));'
    return _run(folder, "node", "--input-type=module", "-e", call)


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.openapi_clients", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", type=Path, metavar="CHECKPOINTS", help="what `python -m builder.demo.install` wrote")
    main(parser.parse_args().checkpoints.resolve())
