"""Composition: the two files of a federation. In: their folders. Out: what all agreed on, and what one site adds.

`federation.toml` is the agreement: a configuration as for `consilium run`, without a table of where images lie, and a
table `[deployment]`. Every hospital and the coordinator hold the same. `site.toml` is a hospital's own: its name, where
its images lie, on what it computes. It cannot change what was agreed on; the handshake would say so.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator

from consilium import __version__, checkpoint, config_file, registry
from consilium.config_sites import changed
from consilium.errors import ConfigError, ConsiliumError, StateError
from consilium.registry import Options, options_error

if TYPE_CHECKING:  # the whole agreement is read with torch; who takes part and where they meet, without
    from consilium.config import Config
    from consilium.deployment.gate import GateConfig

FEDERATION, SITE, SECRET, NODES, COORDINATOR = "federation.toml", "site.toml", "secret.json", "nodes", "coordinator"
SOCKET, STATE, LOG, PAGE = Path("socket") / "site", "state", "log.jsonl", "report.html"  # in a hospital's folder
RUN, SETTLED = "run", "settled"  # in the coordinator's: the run itself, and which agreement was read as a whole
OWN = ("sites", "engine", "backbone")  # tables of a configuration that a site's file may hold; of the last the weights
_HOST = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252}[A-Za-z0-9])?"
)  # also a name in a certificate, a word of a command
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # also a system's service, a host's user, a word of a script
_DIGEST = re.compile(r"[0-9a-f]{4,64}")
T = TypeVar("T", bound=Options)
Seconds = Annotated[float, Field(gt=0)]


class Deployment(Options):
    """Who takes part, where they meet, and how long a round waits."""

    sites: tuple[str, ...]
    address: str = "127.0.0.1:9092"  # of the SuperLink, host:port, as hospitals reach it
    deadline: Seconds = 3600.0  # seconds that a round waits for all of its sites
    grace: float = Field(default=60.0, ge=0)  # seconds after that for those that are late
    late: Literal["drop", "next_round"] = Field(
        default="drop",
        description="what becomes of a reply that comes after its round: drop, or next_round: it stands for the site's "
        "reply to the round after it, where that is still open; refused for methods whose rounds are no plain means",
    )
    poll: Seconds = 1.0  # seconds between two looks of the coordinator

    @field_validator("sites")
    @classmethod
    def _named(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        reserved = ("", ".", "..", "global", COORDINATOR)
        unfit = [name for name in sites if name in reserved or not _NAME.fullmatch(name)]
        if not sites or unfit or len({name.lower() for name in sites}) < len(sites):  # some disks see no case
            signs = "letters, digits, and after the first also . _ -"
            raise ValueError(
                f"one or more different names that can be a folder's and a service's ({signs}), none of {reserved[1:]}"
            )
        return sites

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if ":" in host:
            raise ValueError("host:port with a name or an IPv4 address: the SuperLink listens on no IPv6 address")
        if not _HOST.fullmatch(host) or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError("host:port, the host in ASCII (a name with other letters in its xn-- form), no https://")
        return address


@dataclass(frozen=True)
class Agreement:
    """What all parties hold."""

    config: Config
    deployment: Deployment
    table: Mapping[str, Any]  # the configuration as it was written, without [deployment]
    folder: Path

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the outputs."""
        assert self.config.task.classes is not None  # `read` refused it
        return self.config.task.classes


@dataclass(frozen=True)
class SiteFile:
    """What one hospital adds, and its own rules of what may leave."""

    name: str
    config: Config
    gate: GateConfig
    folder: Path


def read(folder: Path) -> Agreement:
    """The agreement that lies in a folder; ConfigError where it is none."""
    return read_text(_in(folder, FEDERATION))


def read_text(path: Path) -> Agreement:
    """The agreement of a file."""
    from consilium import config, references
    from consilium.deployment import late

    folder = path.resolve().parent
    table = _plain(path)
    deployment = _parties(table, path)
    del table["deployment"]
    if "sites" in table:
        remedy = f"each hospital writes its own [sites] into its {SITE}; names of sites stand in deployment.sites"
        raise ConfigError("an agreement does not say where images lie", where=str(path), remedy=remedy)
    agreed = config.from_dict(table, base=folder)
    if agreed.task.classes is None:
        remedy = "name all classes: task.classes = [...]; a hospital may lack images of some"
        raise ConfigError("hospitals cannot see each other's classes", where=f"task.classes in {path}", remedy=remedy)
    if agreed.evaluation.references:
        remedy = "leave evaluation.references out; every hospital can run its own with strategy 'local'"
        raise ConfigError("references need all images in one place", where=str(path), remedy=remedy)
    _no_idle(agreed, path)
    references.check_votes(agreed)
    if len(agreed.stages) > 1:
        remedy = "run its first stage; a later one begins with what a simulation hands on"
        raise ConfigError("a deployment has one stage", where=f"stages in {path}", remedy=remedy)
    name = agreed.strategy.name
    if registry.build("strategies", name, agreed.strategy.options()).declares.pools_images:
        remedy = "choose another strategy; a simulation may pool images"
        raise ConfigError("images do not leave hospitals", where=f"strategy in {path}", received=name, remedy=remedy)
    if deployment.late == late.NEXT_ROUND:
        late.check(agreed, deployment.sites, path)
    return Agreement(agreed, deployment, table, folder)


def read_site(folder: Path) -> SiteFile:
    """The agreement with one hospital's own tables in it; ConfigError where that would change what was agreed on."""
    from consilium import config
    from consilium.deployment.gate import GateConfig

    path, agreement = _in(folder, SITE), read(folder)
    own = config_file.read(path)
    name, rules = _name_in(own, path, agreement.deployment), own.pop("gate", {})
    _only_own(own, path)
    if "only" in own.get("sites", {}):
        remedy = "leave it out: a table with a site column has the agreement's name in it"
        raise ConfigError("a hospital is the site of its own file", where=f"sites.only in {path}", remedy=remedy)
    table = json.loads(json.dumps(dict(agreement.table), default=str))
    for key, value in own.items():
        table[key] = {**table.get(key, {}), **value}
    table["sites"] = {**table.get("sites", {}), "only": name}
    gate = _options(GateConfig, rules, f"gate in {path}")
    found = config.from_dict(table, base=folder.resolve())
    _no_idle(found, path)
    return SiteFile(name, found, gate, folder.resolve())


def check_template(path: Path) -> None:
    """ConfigError for what cannot be every hospital's own file, without its name."""
    from consilium.deployment.gate import GateConfig

    own = config_file.read(path)
    if "site" in own:
        remedy = "leave it out: each hospital's name is put in front"
        raise ConfigError("a file for every hospital names none", where=f"site in {path}", remedy=remedy)
    _options(GateConfig, own.pop("gate", {}), f"gate in {path}")
    _only_own(own, path)


def deployment(folder: Path) -> Deployment:
    """Who takes part and where they meet, of the agreement in a folder; the rest of it is not looked at."""
    path = _in(folder, FEDERATION)
    return _parties(_plain(path), path)


def _plain(path: Path) -> dict[str, Any]:
    """The tables of an agreement. ConfigError for signs that a terminal obeys: whoever wrote it could hide lines from
    the person who is to approve it."""
    table = config_file.read(path)
    odd = next((text for text in _texts(table) if not text.isprintable()), None)
    if odd is not None:
        remedy = "ask whoever wrote the agreement to leave them out; it needs none, nor line ends in a text"
        raise ConfigError("signs that cannot be seen", where=str(path), received=ascii(odd), remedy=remedy)
    return table


def _texts(value: object) -> Iterator[str]:
    """Every key and every text in a table."""
    if isinstance(value, str):
        yield value
    for each in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(each)


def _parties(table: Mapping[str, Any], path: Path) -> Deployment:
    if "deployment" not in table:
        remedy = "say in it which hospitals take part (sites) and where the coordinator is (address)"
        raise ConfigError("no table [deployment]", where=str(path), received=", ".join(sorted(table)), remedy=remedy)
    return _options(Deployment, table["deployment"], f"deployment in {path}")


def site_name(folder: Path) -> str:
    """Of the hospital whose folder this is; ConfigError where it is none's of the agreement."""
    path = _in(folder, SITE)
    return _name_in(config_file.read(path), path, deployment(folder))


def _in(folder: Path, name: str) -> Path:
    """A file that every folder of its kind has; ConfigError where this is another folder."""
    path, whose = folder / name, "a hospital's folder" if name == SITE else "a folder of a federation"
    if not path.is_file():
        remedy = "give the folder that consilium deploy init made" + (" for this hospital" if name == SITE else "")
        raise ConfigError(f"this is not {whose}", where=str(folder), received=f"no {name} in it", remedy=remedy)
    return path


def _name_in(own: dict[str, Any], path: Path, deployment: Deployment) -> str:
    name = own.pop("site", None)
    if name not in deployment.sites:
        allowed = ", ".join(sorted(deployment.sites))
        raise ConfigError(
            "this site is no part of the agreement", where=f"site in {path}", allowed=allowed, received=name
        )
    return str(name)


def settled(folder: Path) -> Deployment:
    """The same, of an agreement that was read as a whole: once per version of the package, for the same bytes."""
    found, path = deployment(folder), folder / SETTLED
    if not path.is_file() or path.read_bytes() != _mark(folder):
        read(folder)
        settle(folder)
    return found


def settle(folder: Path) -> None:
    """Note that the agreement in a coordinator's folder was read as a whole."""
    checkpoint.write_bytes(folder / SETTLED, _mark(folder))


def _mark(folder: Path) -> bytes:
    return f"{hashlib.sha256((folder / FEDERATION).read_bytes()).hexdigest()} {__version__}\n".encode()


def check_digest(digest: str | None) -> None:
    """ConfigError for what is no digest nor the beginning of one; None stands for none that was given."""
    if digest is not None and not _DIGEST.fullmatch(digest):
        allowed = "64 hexadecimal digits, or the first ones, 4 at least"
        raise ConfigError("this is no digest of an agreement", where="--digest", allowed=allowed, received=repr(digest))


def public_keys(folder: Path, deployment: Deployment) -> dict[str, bytes]:
    """site -> public key of its node, as enrolled at the coordinator; ConfigError where a site has none."""
    paths = {site: folder / NODES / f"{site}.pub" for site in deployment.sites}
    missing = sorted(site for site, path in paths.items() if not path.is_file())
    if missing:
        remedy = "enrol them: consilium coordinator enrol FOLDER SITE PUBLIC_KEY"
        raise ConfigError("sites without a key", where=str(folder / NODES), received=", ".join(missing), remedy=remedy)
    return {site: path.read_bytes() for site, path in paths.items()}


def _no_idle(found: Config, path: Path) -> None:
    """ConfigError for keys of the engine that only a simulation of several sites heeds."""
    idle = sorted(changed(found.engine) & {"workers", "pool", "stacked_sites"})
    if idle:
        remedy = "leave them out: every hospital is a process of its own"
        raise ConfigError(
            "these have no effect across hospitals", where=f"engine in {path}", received=idle, remedy=remedy
        )


def _only_own(own: Mapping[str, Any], path: Path) -> None:
    weights = own.get("backbone", {})
    foreign = [key for key, value in own.items() if key not in OWN or not isinstance(value, dict)]
    foreign += [f"backbone.{key}" for key in weights if key != "weights"] if isinstance(weights, dict) else []
    if foreign:
        allowed = "site, [sites], [engine], [gate] and backbone.weights"
        remedy = "what all sites share stands in the federation's file, and changes for all at once"
        raise ConfigError(
            "a site cannot change the agreement", where=str(path), allowed=allowed, received=foreign, remedy=remedy
        )


def secret(folder: Path) -> int:
    """The seed of the site's personal tensors: drawn at the site, once, known to nobody else."""
    path = folder / SECRET
    if not path.is_file():
        checkpoint.write_json(path, {"seed": secrets.randbits(63)})
        path.chmod(0o600)
    found = checkpoint.read_json(path)
    seed = found.get("seed") if isinstance(found, dict) else None
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        remedy = "restore it from the site's backup: without it the personal model cannot be repeated"
        raise StateError("the site's secret cannot be read", where=str(path), remedy=remedy)
    return seed


def _options(model: type[T], table: object, where: str) -> T:
    try:
        return model.model_validate(table)
    except ValidationError as error:
        found: ConsiliumError = options_error(where, error, model)
        raise found from error
