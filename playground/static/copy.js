// The request as something to run elsewhere. A key is named, never written.

import { toJson } from "./api.js";

export function copyAs(kind, request, target) {
  return { curl, Python: python, JSON: (input) => toJson({ input }, 2) }[kind](request, target);
}

function curl(input, target) {
  const lines = [`curl -sS '${quoted(address(target))}'`];
  if (target.key_variable) lines.push(`-H "Authorization: Bearer $${target.key_variable}"`);
  lines.push("-H 'Content-Type: application/json'", `-d '${quoted(toJson({ input }, 2))}'`);
  return lines.join(" \\\n  ");
}

function python(input, target) {
  const header = target.key_variable
    ? `\n    headers={"Authorization": f"Bearer {os.environ['${target.key_variable}']}"},`
    : "";
  return `import json
${target.key_variable ? "import os\n" : ""}
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

/** A local worker answers when it is done; an endpoint at once, with an id for /status. */
const address = (target) => `${target.base}/${target.endpoint ? "run" : "runsync"}`;

/** Inside '…' of a shell. */
const quoted = (text) => text.replaceAll("'", `'\\''`);
