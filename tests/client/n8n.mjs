// Runs a workflow of n8n: the nodes and parameters that examples/n8n uses, and no others. Prints what the last node gives.

import { readFileSync } from "node:fs";

const { nodes, connections } = JSON.parse(readFileSync(process.argv[2], "utf8"));
const results = new Map();

/** A parameter; one that begins with "=" has expressions in it. */
function value(text, $json) {
  if (typeof text !== "string" || !text.startsWith("=")) return text;
  const $ = (name) => ({ first: () => ({ json: results.get(name) }) });
  return text.slice(1).replace(/\{\{(.+?)\}\}/gs, (_, code) => new Function("$json", "$", `return (${code})`)($json, $));
}

function only(parameters, ...known) {
  const others = Object.keys(parameters).filter((name) => !known.includes(name));
  if (others.length) throw new Error(`parameters that are not imitated here: ${others}`);
}

/** Each gives [what the next node gets, which output]. */
const KINDS = {
  manualTrigger: () => [{}, 0],
  set(parameters, $json) {
    only(parameters, "mode", "jsonOutput", "options");
    return [JSON.parse(value(parameters.jsonOutput, $json)), 0];
  },
  async httpRequest(parameters, $json) {
    only(parameters, "method", "url", "authentication", "genericAuthType", "sendBody", "specifyBody", "jsonBody", "options");
    const body = parameters.sendBody ? value(parameters.jsonBody, $json) : undefined;
    const headers = { Authorization: "Bearer key", ...(body && { "Content-Type": "application/json" }) };
    const response = await fetch(value(parameters.url, $json), { method: parameters.method ?? "GET", headers, body });
    if (!response.ok) throw new Error(`status ${response.status}`);
    return [await response.json(), 0];
  },
  async wait(parameters, $json) {
    only(parameters, "amount", "unit");
    await new Promise((resolve) => setTimeout(resolve, (1000 * parameters.amount) / 50));
    return [$json, 0];
  },
  if(parameters, $json) {
    only(parameters, "conditions", "options");
    const { combinator, conditions } = parameters.conditions;
    const holds = ({ leftValue, rightValue, operator }) => {
      if (operator.operation !== "equals") throw new Error(operator.operation);
      return value(leftValue, $json) === rightValue;
    };
    return [$json, (combinator === "or" ? conditions.some(holds) : conditions.every(holds)) ? 0 : 1];
  },
  stopAndError(parameters, $json) {
    only(parameters, "errorMessage");
    return [{ error: value(parameters.errorMessage, $json) }, 0];
  },
};

let node = nodes.find(({ type }) => type.endsWith(".manualTrigger"));
let $json;
while (node) {
  const [given, output] = await KINDS[node.type.replace("n8n-nodes-base.", "")](node.parameters, $json);
  results.set(node.name, ($json = given));
  const next = connections[node.name]?.main[output]?.[0]?.node;
  node = nodes.find(({ name }) => name === next);
}
console.log(JSON.stringify($json));
