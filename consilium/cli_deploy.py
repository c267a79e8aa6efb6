"""Common: the verbs of a federation across hospitals. In: words. Out: one call per verb.

`deploy` prepares folders, `site` is for a hospital, `coordinator` for whoever leads the round loop. Exit codes tell
how a run ended, whatever the programs below say: 0 finished, 1 failed, stopped or died, 2 words or files that cannot
be used, 3 still going on.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from consilium.cli_data import Json, Lines, print_json

deploy = typer.Typer(no_args_is_help=True, help="Prepare a federation across hospitals.")
site = typer.Typer(no_args_is_help=True, help="At a hospital: look at what is there, and take part.")
coordinator = typer.Typer(no_args_is_help=True, help="At the coordinator: start, submit, watch, resume, stop.")

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that `consilium deploy init` made.")]


@deploy.callback()
def _deploy() -> None:
    """A group with one verb is a group all the same."""


@deploy.command("init")
def init(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION", help="The agreement, a TOML file.")],
    out: Annotated[Path, typer.Option(help="Where the folders of coordinator and hospitals are made.")],
    site_file: Annotated[
        Path | None, typer.Option("--site-file", help="Tables for every hospital's own file, to try out.")
    ] = None,
) -> None:
    """Make a folder for the coordinator and one per hospital, with keys and certificates to try out."""
    from consilium.deployment.init import init as make
    from consilium.deployment.leaflets import checklist

    folders = make(federation, out, site_file)
    print(checklist(federation, folders))


@site.command("join")
def join(
    folder: Folder,
    service: Annotated[
        bool, typer.Option("--service-only", help="Without Flower's node: `site node` runs it.")
    ] = False,
    socket: Annotated[Path | None, typer.Option(help="With --service-only: where to listen.")] = None,
    node_user: Annotated[
        str | None, typer.Option(help="With --service-only: the system's user who runs the node, and may ask.")
    ] = None,
    json: Lines = False,
) -> None:
    """Serve this hospital's site, and connect it to the coordinator, until Ctrl-C."""
    from consilium.deployment import hospital

    if not service and (socket or node_user):
        raise typer.BadParameter("--socket and --node-user belong to --service-only")
    with _shown(json) as show:
        if service:
            return hospital.serve(folder, show, _until_ended, socket, node_user)
        return hospital.join(folder, show, _until_ended)


@site.command("node")
def node(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With federation.toml and keys/; no more is needed.")
    ],
    socket: Annotated[
        Path | None, typer.Option(help="Where the site's service listens; left out: in the same folder.")
    ] = None,
    json: Lines = False,
) -> None:
    """Connect a site's service to the coordinator, as a user of its own who cannot read images, until Ctrl-C."""
    from consilium.deployment import files
    from consilium.deployment.node import connect

    with _shown(json) as show:
        connect(folder, socket or folder / files.SOCKET, show, _until_ended)


@site.command("check")
def check(
    folder: Folder,
    digest: Annotated[
        str | None, typer.Option(help="Of the agreement, as another party tells it, or how that begins.")
    ] = None,
    json: Json = False,
) -> None:
    """Users, data, leakage, digests, rules, room, device, connection, clock, before anybody waits; code 1 if bad."""
    from consilium import listing, progress
    from consilium.deployment.site_check import check as examine

    with progress.quiet() as show:
        found = examine(folder, show, digest)
    print_json([vars(each) for each in found]) if json else listing.show(listing.findings(found))
    if any(each.verdict == "bad" for each in found):
        raise typer.Exit(1)


@site.command("approve")
def approve(
    folder: Folder,
    by: Annotated[str, typer.Option(help="Who approves it.")],
    digest: Annotated[str | None, typer.Option(help="Of the agreement; must be that of this folder.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Without asking.")] = False,
) -> None:
    """Look at what an agreement sends, and approve it for this hospital."""
    from consilium import listing
    from consilium.deployment import approvals, consent

    terms = consent.terms(folder, digest)
    listing.show(consent.words(terms))
    if not yes:
        typer.confirm("Approve?", abort=True)
    approvals.approve(folder, terms["agreement"], by)
    print(f"approved by {by}: {terms['agreement']}")


@site.command("withdraw")
def withdraw(
    folder: Folder,
    by: Annotated[str, typer.Option(help="Who takes it back.")],
    digest: Annotated[
        str | None, typer.Option(help="Of the agreement, or how it begins; needed where several are approved.")
    ] = None,
) -> None:
    """Take an approval back: from now on nothing leaves for this agreement, and no restart is needed."""
    from consilium.deployment import approvals, files

    files.site_name(folder)
    row = approvals.withdraw(folder, by, digest)
    print(f"taken back by {row['by']}: {row['agreement']}; what the site keeps of its runs stays (site states)")


@site.command("approvals")
def approvals(folder: Folder, json: Json = False) -> None:
    """Who approved which agreement, who took it back, and when."""
    from consilium import listing
    from consilium.deployment import approvals, files

    files.site_name(folder)
    rows = approvals.history(folder)
    if json:
        return print_json(rows)
    return listing.show(listing.rows(rows)) if rows else print("nobody has approved anything here")


@site.command("report")
def page(
    folder: Folder,
    run: Annotated[str | None, typer.Option(help="Name of a run; left out: the one that ended last here.")] = None,
) -> None:
    """Make this hospital's own page of a run that ended: its model on its own images, and what left. It stays here."""
    from consilium.deployment.hospital import page as make

    print(make(folder, run))


@site.command("audit-log")
def audit_log(folder: Folder, json: Json = False) -> None:
    """Verify the journal of all that left this hospital, and print it."""
    from consilium import listing
    from consilium.deployment import files, keeping
    from consilium.deployment.journal import Journal, table

    files.site_name(folder)
    entries = list(Journal(folder).entries())
    if not entries:
        keeping.check_unanswered(folder)
    if json:
        return print_json(entries)
    if not entries:
        return print("nothing has left this hospital")
    listing.show(listing.rows(table(entries)))
    return print(f"{len(entries)} lines, whole and in order; the last one is {Journal(folder).last()}")


@site.command("states")
def states(
    folder: Folder,
    json: Json = False,
    delete: Annotated[str | None, typer.Option(metavar="RUN", help="Remove what is kept of this run.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Without asking.")] = False,
) -> None:
    """What this hospital keeps of each run: rounds and bytes; delete one run's share, to withdraw."""
    from consilium import listing
    from consilium.deployment import files, keeping

    files.site_name(folder)
    if delete is not None:
        size = keeping.kept_bytes(folder, delete)
        if not yes:
            what = f"Delete the {size:,} bytes that this site learnt in run {delete}? They cannot be brought back"
            typer.confirm(what, abort=True)
        return print(f"{delete}: {keeping.delete(folder, delete):,} bytes deleted; the journal stays")
    found = keeping.states(folder)
    if json:
        return print_json(found)
    return listing.show(listing.rows(found)) if found else print("nothing is kept here")


@coordinator.command()
def start(folder: Folder, json: Lines = False) -> None:
    """Run the SuperLink that hospitals connect to, until Ctrl-C."""
    from consilium.deployment import office

    with _shown(json) as show:
        office.start(folder, show, _until_ended)


@coordinator.command()
def enrol(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="SITE", help="A site of the agreement.")],
    key: Annotated[Path, typer.Argument(metavar="PUBLIC_KEY", help="The site's node.key.pub.")],
) -> None:
    """Take in the public key of a hospital's node."""
    from consilium.deployment import office

    print(f"{name}: {office.enrol(folder, name, key)}")
    if others := office.twins(folder, name):
        print(f"warning: {', '.join(others)} has the same key: no run begins before each has its own", file=sys.stderr)


Wait = Annotated[bool, typer.Option("--wait", help="Watch the run to its end; the exit code says how it ended.")]


@coordinator.command()
def submit(folder: Folder, wait: Wait = False) -> None:
    """Begin the run, or go on after its last closed round."""
    from consilium.deployment import office

    print(f"run {office.submit(folder)['run-id']} of Flower")
    if wait:
        _follow(folder)


@coordinator.command()
def resume(folder: Folder, wait: Wait = False) -> None:
    """Go on with a run that was stopped, failed or died, after its last closed round."""
    from consilium.deployment import office

    office.begun(folder)
    submit(folder, wait)


@coordinator.command()
def status(
    folder: Folder,
    json: Json = False,
    follow: Annotated[bool, typer.Option("--follow", help="Until the run has ended.")] = False,
    page: Annotated[
        int | None, typer.Option(metavar="PORT", min=0, max=65535, help="Serve a page to this machine, until Ctrl-C.")
    ] = None,
) -> None:
    """How the run and every site stand; exit code 0 finished, 1 failed, stopped or died, 3 going on."""
    from consilium.deployment import office

    if json + follow + (page is not None) > 1:
        raise typer.BadParameter("--json, --follow and --page: one of them at a time")
    if page is not None:
        from consilium.deployment import page as browser

        return browser.serve(folder, page, lambda text: print(text, flush=True), _until_ended)
    if follow:
        return _follow(folder)
    found = office.status(folder)
    _print(found) if not json else print_json(found)
    return _leave(found)


@coordinator.command()
def stop(folder: Folder) -> None:
    """End the run; closed rounds stay."""
    from consilium.deployment import office

    office.stop(folder)
    print("stopped; `consilium coordinator resume` goes on after the last closed round")


def _shown(json: bool) -> AbstractContextManager[Callable[[Mapping[str, object]], None]]:
    from consilium import progress

    return progress.json_lines() if json else progress.plain()


def _follow(folder: Path) -> None:
    from consilium.deployment import live

    _leave(live.follow(folder))


def _print(table: Mapping[str, Any]) -> None:
    from consilium.deployment.board import lines

    print("\n".join(lines(table)), flush=True)


def _leave(table: Mapping[str, Any]) -> None:
    code = {"finished": 0, "failed": 1, "stopped": 1, "died": 1}.get(str(table["state"]), 3)
    raise typer.Exit(code)


def _until_ended() -> None:
    """Until the process is asked to end."""
    import signal

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    while not ended.wait(1.0):
        pass
