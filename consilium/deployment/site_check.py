"""Composition: a hospital before anybody waits for it. In: the site's folder. Out: findings, good, doubtful or bad.

Nothing is trained and nothing leaves but a greeting to the coordinator's address. What can be looked at is looked at,
also where something before it is bad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from consilium import run
from consilium.deployment import files, gate, machine, processes, reach
from consilium.deployment.files import SiteFile
from consilium.deployment.journal import Journal
from consilium.deployment.reach import Finding, Verdict
from consilium.errors import ConsiliumError
from consilium.experiment import Experiment, assemble
from consilium.results import site_table
from consilium.sites import audit
from consilium.sites.federation import Federation

Show = Callable[[Mapping[str, object]], None]
_NAMED = 5  # images that are named in a line


def check(folder: Path, show: Show, digest: str | None = None) -> list[Finding]:
    """All findings, in the order in which they would be mended. ConsiliumError where the folder's files are wrong.

    `digest`: of the agreement, as somebody else tells it, or how that begins.
    """
    own = files.read_site(folder)
    files.check_digest(digest)
    found = [machine.users(own.folder), machine.permissions(own.folder), *machine.socket(own.folder), machine.flower()]
    prepared = None
    with _reported(found, "data"):
        prepared = run.prepare(own.config, show)
        found += _data(own, prepared)
    with _reported(found, "model"):
        pieces = assemble(own.config, own.config.task.classes or ())
        found += [*_model(pieces, digest), *(_rules(own, pieces, prepared) if prepared else [])]
        found += [*machine.disk(own, pieces), machine.memory(), machine.device(own, pieces.setting.device)]
    with _reported(found, "secret"):
        if (own.folder / files.SECRET).exists():  # else it is drawn when the service begins
            files.secret(own.folder)
    found.append(_journal(own))
    address = files.deployment(folder).address
    return [*found, *reach.connection(own.folder / "keys" / processes.CA, address)]


@contextmanager
def _reported(found: list[Finding], what: str) -> Iterator[None]:
    try:
        yield
    except ConsiliumError as error:
        found.append(_bad(what, error))


def _bad(what: str, error: ConsiliumError) -> Finding:
    told = {"where": error.where, "allowed": error.allowed, "received": error.received}
    facts = [f"{name}: {value}" for name, value in told.items() if value is not None]
    return Finding(what, "bad", "; ".join([error.what, *facts]), error.remedy or "mend it where the line says")


# ------------------------------------------------------------------------------------------------ data
def _data(own: SiteFile, prepared: Federation) -> list[Finding]:
    found = []
    for split, row in site_table(prepared.sites[own.name], prepared.classes).items():
        counts = ", ".join(f"{name} {count}" for name, count in row["classes"].items())
        text = f"{row['n']} of {row['groups']} groups: {counts}"
        remedy = "" if row["n"] else f"nothing will be measured on {split} images: more groups, or other sites.split"
        found.append(Finding(f"{split} images", "good" if row["n"] else "doubtful", text, remedy))
    found.append(_leakage(prepared))
    remedy = "for your data's owner to judge; training goes on"
    said = [text for text in prepared.warnings if "byte for byte" not in text]  # `leakage` names the images
    found += [Finding("data", "doubtful", text, remedy) for text in said]
    return [*found, Finding("split", "good", prepared.split_hash)]


def _leakage(prepared: Federation) -> Finding:
    """Whether anything of a training image is measured upon: groups in two splits, and images byte for byte in two."""
    looked = audit.audit(prepared.split, prepared.hashes, prepared.corrupt)
    groups = [each.group for each in looked.groups_across_splits]
    doubled = [" = ".join(each.ids) for each in looked.duplicates if len(each.splits) > 1]
    if not groups and not doubled:
        return Finding("leakage", "good", "no group and no image is in two splits")
    text = f"{len(groups)} groups and {len(doubled)} images are in two splits: {_few([*groups, *doubled])}"
    return Finding("leakage", "doubtful", text, "give equal images one group, or take all but one out of the table")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# ------------------------------------------------------------------------------------------------ what was agreed on
def _model(pieces: Experiment, digest: str | None) -> list[Finding]:
    handshake, same = pieces.handshake, "(is to be the same everywhere)"
    wrong = digest is not None and not handshake.agreement.startswith(digest)
    verdict: Verdict = "bad" if wrong else "good"
    text = f"{handshake.agreement}, not {digest}" if wrong else f"{handshake.agreement} {same}"
    remedy = "compare federation.toml, byte by byte, and the digest of the backbone below" if wrong else ""
    return [
        Finding("agreement", verdict, text, remedy),
        Finding("backbone", "good", f"{handshake.backbone} {same}"),
        Finding("version", "good", f"{handshake.version} {same}"),
    ]


def _rules(own: SiteFile, pieces: Experiment, prepared: Federation) -> list[Finding]:
    found: list[Finding] = []
    with _reported(found, "gate"):
        rules = gate.Gate(own.gate, pieces, prepared.sites[own.name], own.folder)
        gate.check(rules)
        why = rules.barred(pieces.handshake.version)
        remedy = "the hospital's own word: change [gate] or approve, or do not take part" if why else ""
        found.append(Finding("gate", "bad" if why else "good", why or "this agreement may be answered", remedy))
        found += [*_place(rules), *_odd(rules)]
    return found


def _odd(rules: gate.Gate) -> list[Finding]:
    """What the hospital wrote for nothing: the metrics that it meant are blanked without a word."""
    found = ", ".join(gate.unmeasured(rules))
    remedy = "names are those of a report's tables, as accuracy or sensitivity.*; compare the spelling"
    text = f"this task measures nothing that is called so: {found}"
    return [Finding("gate.metrics", "doubtful", text, remedy)] if found else []


def _place(rules: gate.Gate) -> list[Finding]:
    """Whether there is a place for a run that is new; one that the site knows goes on."""
    why = rules.full("")
    remedy = "delete one that is over, while the service is stopped: consilium site states FOLDER --delete RUN"
    return [Finding("runs", "doubtful", f"a new run would be refused: {why}", remedy)] if why else []


# ------------------------------------------------------------------------------------------------ what is there
def _journal(own: SiteFile) -> Finding:
    try:
        lines = sum(1 for _ in Journal(own.folder).entries())
    except ConsiliumError as error:
        return _bad("journal", error)
    return Finding("journal", "good", f"{lines} lines, whole")
