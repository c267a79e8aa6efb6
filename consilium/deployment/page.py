"""Composition: how a run stands, for a browser. In: the coordinator's folder. Out: a page for this machine, read only.

It holds what `consilium coordinator status` prints, and the closed rounds. It is served to this machine alone; from
another one it is reached through ssh -L. It has no script, asks nothing of any other server and loads itself anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jinja2
from rich.filesize import decimal

from consilium import config_file
from consilium.deployment import files, office
from consilium.errors import ConsiliumError, StateError
from consilium.progress import estimate, sparkline

HERE, EVERY = "127.0.0.1", 5  # where it is served; seconds after which the page loads itself anew
METRIC = "balanced_accuracy"
SHOWN = 20  # closed rounds, the newest first
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{{ every }}">
<meta name="viewport" content="width=device-width"><title>{{ table.state }}: {{ name }}</title>
<style>
:root { color-scheme: light dark; --good: #16803c; --busy: #2563eb; --bad: #c02626; --idle: #666 }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --busy: #7cb0ff; --bad: #ff8080; --idle: #aaa } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #8884; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
td.n { white-space: nowrap } .said, pre { overflow-wrap: anywhere }
@media (max-width: 40rem) { th, td { padding: .2rem; font-size: .8rem } }
.s { padding: 0 .5em; border-radius: .6em; border: 1px solid; white-space: nowrap }
.good { color: var(--good) } .busy { color: var(--busy) } .bad { color: var(--bad) } .idle { color: var(--idle) }
pre { white-space: pre-wrap; color: var(--bad) } small { color: var(--idle) }
</style>
<h1>{{ name }} <span class="s {{ table.state | kind }}">{{ table.state }}</span></h1>
<p>Round {{ table.round or 0 }} of {{ table.rounds or "?" }}{% if table.closed %}, {{ table.closed }} closed{% endif %}.
{% if trend %}Validation balanced accuracy {{ last }} {{ trend }}.{% endif %}
{{ up }} from hospitals and {{ down }} to them so far.</p>
{% if table.message %}<pre>{{ table.message }}</pre>{% endif %}
<table><tr><th>site<th>state<th>since (UTC)<th>what is said
{% for site, row in table.sites | dictsort -%}
<tr><td>{{ site }}<td><span class="s {{ row.status | kind }}">{{ row.status }}</span>
<td>{{ row.since[11:19] }}<td class="said">{{ row.message or "" }}
{% endfor %}</table>
{% if rounds %}<table><tr><th class="n">round<th class="n">seconds<th>replies<th class="n">up<th class="n">down
<th class="n">validation balanced accuracy
{% for row in rounds -%}
<tr><td class="n">{{ row.round }}<td class="n">{{ row.seconds }}<td>{{ row.replies }}<td class="n">{{ row.up }}
<td class="n">{{ row.down }}<td class="n">{{ row.value }}
{% endfor %}</table>{% endif %}
<small>{{ table.time[:19] | replace("T", " ") }} UTC; anew every {{ every }} s; the same as JSON: /status.json</small>
</html>
"""
KINDS = {
    "good": ("finished", "done", "ok"),
    "busy": ("running", "training", "testing"),
    "idle": ("starting", "waiting"),
}


def html(folder: Path) -> str:
    """The page as it stands now; also where no run was begun."""
    table, lines = _table(folder), rounds(folder / files.RUN / "events.jsonl")
    values = [value for line in lines if (value := (line.get("val_mean") or {}).get(METRIC)) is not None]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    environment.filters["kind"] = kind
    return environment.from_string(TEMPLATE).render(
        name=name(folder),
        table=table,
        rounds=[_row(line) for line in reversed(lines[-SHOWN:])],
        trend=sparkline(values[-SHOWN:]),
        last=estimate(values[-1]) if values else "",
        up=decimal(sum(_bytes(line, "up") for line in lines)),
        down=decimal(sum(_bytes(line, "down") for line in lines)),
        every=EVERY,
    )


def name(folder: Path) -> str:
    """Of the agreement; of one that cannot be read now, as while somebody edits it, no name."""
    try:
        return str(config_file.read(folder / files.FEDERATION).get("name", "run"))
    except ConsiliumError:
        return "run"


def kind(state: object) -> str:
    """How a state of a run or of a site is to be taken: good, busy, idle, or bad."""
    return next((each for each, states in KINDS.items() if state in states), "bad")


def _table(folder: Path) -> dict[str, Any]:
    try:
        return office.status(folder)
    except ConsiliumError as error:
        return {"state": "waiting", "round": 0, "sites": {}, "message": str(error), "time": ""}


def rounds(path: Path) -> list[dict[str, Any]]:
    """Closed rounds; a last line that is only half written is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _row(line: Mapping[str, Any]) -> dict[str, object]:
    sites = {site: each["status"] for site, each in line["sites"].items()}
    others = [f"{site} {status}" for site, status in sorted(sites.items()) if status != "ok"]
    others += [f"{site} for round {each['late_from']}" for site, each in line["sites"].items() if "late_from" in each]
    return {
        "round": line["round"],
        "seconds": f"{line['seconds']:.1f}",
        "replies": ", ".join([f"{sum(status == 'ok' for status in sites.values())} of {len(sites)}", *others]),
        "up": decimal(_bytes(line, "up")),
        "down": decimal(_bytes(line, "down")),
        "value": estimate((line.get("val_mean") or {}).get(METRIC)),
    }


def _bytes(line: Mapping[str, Any], way: str) -> int:
    return sum(line["bytes"][way].values())


# ------------------------------------------------------------------------------------------------ the server
def serve(folder: Path, port: int, say: Callable[[str], None], until: Callable[[], None]) -> None:
    """Serve the page until `until` returns; 0 takes any free port. StateError where the port is taken."""
    office.known(folder)
    files.deployment(folder)
    try:
        server = ThreadingHTTPServer((HERE, port), partial(_Handler, folder))
    except (OSError, OverflowError) as error:
        remedy = "choose another port, or 0 for any that is free"
        raise StateError(
            "the page cannot be served", where=f"{HERE}:{port}", received=str(error), remedy=remedy
        ) from error
    with server:
        Thread(target=server.serve_forever, daemon=True).start()
        say(f"http://{HERE}:{server.server_address[1]}")
        until()
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    """Two addresses, read only."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """The page, or the table as JSON; nothing for who calls this machine by another name, as hostile pages do."""
        called = self.headers.get("Host", "").rpartition(":")[0]
        if called not in (HERE, "localhost"):
            self.send_error(403)
        elif self.path == "/":
            self._send("text/html; charset=utf-8", html(self.folder))
        elif self.path == "/status.json":
            self._send("application/json", json.dumps(_table(self.folder)))
        else:
            self.send_error(404)

    def _send(self, kind: str, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        for key, value in (("Content-Type", kind), ("Content-Length", str(len(data))), ("Cache-Control", "no-store")):
            self.send_header(key, value)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a page that loads itself anew would fill the terminal."""
