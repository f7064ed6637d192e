// The request as code to run elsewhere. The code names the variable of the API key; it never contains the key.

import { toJson } from "./api.js";

const KEY = "RUNPOD_API_KEY";

export function copyAs(kind, request, target) {
  return { curl, Python: python, JSON: (input) => toJson({ input }, 2) }[kind](request, target);
}

function curl(input, target) {
  const lines = [`curl -sS '${quoted(address(target))}'`];
  if (!target.is_local) lines.push(`-H "Authorization: Bearer $${KEY}"`);
  lines.push("-H 'Content-Type: application/json'", `-d '${quoted(toJson({ input }, 2))}'`);
  return lines.join(" \\\n  ");
}

function python(input, target) {
  const header = target.is_local ? "" : `\n    headers={"Authorization": f"Bearer {os.environ['${KEY}']}"},`;
  return `import json
${target.is_local ? "" : "import os\n"}
import requests

job = json.loads(r"""
${toJson({ input }, 2)}
""")
response = requests.post(
    "${address(target)}",${header}
    json=job,
    timeout=600,
)
print(response.json())
`;
}

/** A local worker answers /runsync when the job is done. An endpoint answers /run at once, with an id for /status. */
const address = (target) => `${target.url}/${target.is_local ? "runsync" : "run"}`;

/** Escapes text between single quotes of a shell. */
const quoted = (text) => text.replaceAll("'", `'\\''`);
