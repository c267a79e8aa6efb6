"""Composition: a hospital before anybody waits for it. In: the site's folder. Out: findings, good, doubtful or bad.

Nothing is trained and nothing leaves but a greeting to the coordinator's address.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from consilium import run
from consilium.deployment import files, gate, hospital, processes, reach
from consilium.deployment.files import SiteFile
from consilium.deployment.journal import Journal
from consilium.deployment.reach import Finding, Verdict
from consilium.engines.site import Site
from consilium.engines.state import least_bytes
from consilium.errors import ConsiliumError
from consilium.results import site_table

Show = Callable[[Mapping[str, object]], None]
ROOM = 4  # states that a site keeps at once, with one to spare


def check(folder: Path, show: Show) -> list[Finding]:
    """All findings, in the order in which they would be mended. ConsiliumError where the folder's files are wrong."""
    own = files.read_site(folder)
    found = [*_data(own, show), _journal(own)]
    site = None
    with _reported(found, "model"):
        site = hospital.open_site(own, lambda _: None)
        found += [*_model(site), *_rules(own, site), _disk(own, site)]
    address = files.read(folder).deployment.address
    return [*found, _memory(), _device(own), *reach.connection(own.folder / "keys" / processes.CA, address)]


@contextmanager
def _reported(found: list[Finding], what: str) -> Iterator[None]:
    try:
        yield
    except ConsiliumError as error:
        found.append(Finding(what, "bad", str(error)))


def _data(own: SiteFile, show: Show) -> list[Finding]:
    found: list[Finding] = []
    with _reported(found, "data"):
        prepared = run.prepare(own.config, show)
        table = site_table(prepared.sites[own.name], prepared.classes)
        for split, row in table.items():
            counts = ", ".join(f"{name} {count}" for name, count in row["classes"].items())
            verdict: Verdict = "good" if row["n"] else "doubtful"
            found.append(Finding(f"{split} images", verdict, f"{row['n']} of {row['groups']} groups: {counts}"))
        found += [Finding("data", "doubtful", text) for text in prepared.warnings]
        found.append(Finding("split", "good", prepared.split_hash))
    return found


def _model(site: Site) -> list[Finding]:
    handshake = site.experiment.handshake
    return [
        Finding("agreement", "good", f"{handshake.agreement} (the same everywhere)"),
        Finding("backbone", "good", f"{handshake.backbone} (the same everywhere)"),
        Finding("version", "good", f"{handshake.version} (the same everywhere)"),
    ]


def _rules(own: SiteFile, site: Site) -> list[Finding]:
    found: list[Finding] = []
    with _reported(found, "gate"):
        rules = gate.Gate(own.gate, site.experiment, site.data, own.folder)
        gate.check(rules)
        why = rules.refusal({"handshake": {"version": site.experiment.handshake.version}, "kind": "check"})
        found.append(Finding("gate", "bad" if why else "good", why or "this agreement may be answered"))
    return found


def _journal(own: SiteFile) -> Finding:
    try:
        lines = sum(1 for _ in Journal(own.folder).entries())
    except ConsiliumError as error:
        return Finding("journal", "bad", str(error))
    return Finding("journal", "good", f"{lines} lines, whole")


def _disk(own: SiteFile, site: Site) -> Finding:
    needed, free = ROOM * least_bytes(site.experiment, own.name), shutil.disk_usage(own.folder).free
    text = f"{free / 1e9:.3g} GB free, {needed / 1e6:.3g} MB needed at least"
    return Finding("disk", "good" if free > needed else "bad", text)


def _memory() -> Finding:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return Finding("memory", "doubtful", "this system does not say how much is free")
    return Finding("memory", "good" if free > 2e9 else "doubtful", f"{free / 1e9:.3g} GB free")


def _device(own: SiteFile) -> Finding:
    wanted, there = own.config.engine.device, torch.cuda.is_available()
    if there:
        return Finding("device", "good", torch.cuda.get_device_name())
    bad = wanted.startswith("cuda")
    text = f"{own.config.engine.threads} processor threads, no GPU"
    return Finding("device", "bad" if bad else "good", f"{text}, and engine.device = {wanted!r}" if bad else text)
