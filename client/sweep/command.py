"""The story of one sweep: plan it, have it made, write the results, print what there is."""

from __future__ import annotations

import argparse
import json
from typing import Any

from client.client import Client
from client.display import Display, printable
from client.errors import ClientError
from client.sweep.making import Making
from client.sweep.plan import Plan, plan_of
from client.sweep.record import Record
from client.sweep.results import Results, write_results


def sweep(options: argparse.Namespace, client: Client, display: Display, stdin: Any) -> list[ClientError]:
    """The errors of the cells that failed. Raises the errors of Making.run, InvalidRequest, BadInput and OSError."""
    plan = plan_of(options, client.is_local, stdin)
    for line in plan.lines:
        display.say(line)
    if options.dry_run:
        print(json.dumps([cell.shown_job() for cell in plan.cells], indent=2, ensure_ascii=False))
        return []
    with Record(options.output_dir) as record:
        making = Making(plan.cells, record, client, display)
        try:
            making.run(options.concurrency)
            results = write_results(plan, record)
        except (KeyboardInterrupt, ClientError):
            display.say("stopped; the same command goes on from here")
            for job_id in making.running:
                display.say(f"job {job_id} still runs; `python -m client cancel` stops it")
            raise
        _print(plan, record, results, options.json)
    if making.full_run_seconds:
        display.say(f"drafts: the full run of those made now would take about {making.full_run_seconds:.0f} s of the GPU")
    if making.errors:
        display.say(f"{len(making.errors)} of {len(plan.cells)} failed; the same command tries them again")
    return making.errors


def _print(plan: Plan, record: Record, results: Results, as_json: bool) -> None:
    paths = {"grid": results.grid, "sheet": results.sheet, "page": results.page}
    if as_json:
        files = {name: str(path) if path else None for name, path in paths.items()}
        print(json.dumps(files | {"cells": [record.as_json(cell) for cell in plan.cells]}))
        return
    for path in filter(None, paths.values()):
        print(printable(str(path)))
