"""Engine: Flower. In: encoded requests for hospitals. Out: their encoded replies, over SuperLink and SuperNodes.

The only module that imports Flower, and nothing heavy beside it at first: a SuperNode starts a process for every
message, and `client` in it hands the bytes to the site's own service over a local socket (`relay.py`). No strategy of
Flower is used; the round loop stays the coordinator's. One message per site and round: Flower's floor is its two polls
and the start of that process.

Which site a node speaks for is decided by the public key it was registered with, which the federation file names. A
node that dies is asked again when it is back, as long as the round is open: a request that comes twice gets the reply
of the first time. A round closes when all have replied, or at its deadline and grace. Who had not replied then is not
asked again until it has, so that no closed rounds queue up at its node. Replies get lost, so such a request is given up
when its node went away, when Flower says that there will be no reply, and at the latest after one further deadline and
grace, when Flower no longer hands it out either. A late reply is dropped, unless the coordinator said that it expects
it: then it stands for the site's reply to the question that is open, and the site is not asked that one.
"""

from __future__ import annotations

import hashlib
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid as Grid
from flwr.serverapp import ServerApp

from consilium.engines import relay

if TYPE_CHECKING:
    from consilium.protocols import Failure

MOMENT = 3.0  # seconds for a reply to be fetched, before others are looked at
AGAIN = 15.0  # seconds before a node that failed is asked again
SLACK = 60.0  # seconds at most that a coordinator may take between two rounds, in which no awaited reply expires
SOCKET = "consilium-socket"  # key of the node's own configuration
Tell = Callable[[Mapping[str, object]], None]


# ------------------------------------------------------------------------------------------------ both ends
def pack(data: bytes) -> RecordDict:
    """A message of ours as Flower carries it: in chunks, without looking inside."""
    return RecordDict({"message": ArrayRecord({"bytes": Array("uint8", (len(data),), "consilium", data)})})


def unpack(content: RecordDict) -> bytes:
    """The bytes of `pack`; ValueError for anything else, as whoever holds a registered key may send what they like."""
    record = content.get("message")
    if not isinstance(record, ArrayRecord) or list(content) != ["message"] or list(record) != ["bytes"]:
        raise ValueError("this is no message of Consilium")
    return bytes(record["bytes"].data)


# ------------------------------------------------------------------------------------------------ the hospital's end
def client() -> ClientApp:
    """The app that every SuperNode runs for every message. Whatever goes wrong here, only a code leaves."""
    app = ClientApp()

    def train(message: Message, context: Context) -> Message:
        return Message(answered(message.content, context.node_config), reply_to=message)

    app.train()(train)
    return app


def answered(content: RecordDict, node: Mapping[str, Any]) -> RecordDict:
    """The reply of the site's service, or a code that says that there is none."""
    try:
        return pack(relay.ask(Path(str(node[SOCKET])), unpack(content)))
    except relay.Unreachable:
        code = "unreachable"
    except Exception:  # its text may name files of the hospital, and Flower would send it on
        code = "error"
    return RecordDict({"code": ConfigRecord({"code": code})})


NODE_GONE = 5  # Flower's code of a node whose heartbeat stopped
_CODES = {
    "unreachable": "the site's node is there, but its service does not answer: see the site's log",
    "error": "the site's node could not read the request: see the site's log",
}


# ------------------------------------------------------------------------------------------------ the coordinator's end
def server(conduct: Callable[[Path, Grid], None]) -> ServerApp:
    """The app that the SuperLink runs: `conduct(folder of the coordinator, grid)`."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        conduct(Path(str(context.run_config["folder"])), grid)

    app.main()(main)
    return app


def fingerprint(public_key: bytes) -> str:
    """Of a node's public key, in OpenSSH's form, as it was enrolled, or in PEM, as Flower keeps it."""
    known = _loaded(public_key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(known).hexdigest()


def spoken(public_key: bytes) -> str:
    """The fingerprint that people compare: what `ssh-keygen -l` says of the same key."""
    _, blob, *_ = _loaded(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()
    return "SHA256:" + b64encode(hashlib.sha256(b64decode(blob)).digest()).decode().rstrip("=")


def _loaded(public_key: bytes) -> PublicKeyTypes:
    load = load_ssh_public_key if public_key.startswith(b"ecdsa-") else load_pem_public_key
    return load(public_key)


class Link(NamedTuple):
    """A site's node, and since when it is connected."""

    node: int
    since: str


class Sent(NamedTuple):
    """A request that is under way: to whom, over which link, and until when somebody waits for its reply."""

    site: str
    link: Link
    until: float


def fingerprints(public_keys: Mapping[str, bytes]) -> dict[str, str]:
    """site -> fingerprint; ConfigError where two sites have one key, as one of them would speak for the other."""
    from consilium.errors import ConfigError

    found: dict[str, str] = {}
    for site, key in sorted(public_keys.items()):
        same = [other for other, known in found.items() if known == fingerprint(key)]
        if same:
            remedy = "each hospital makes a node.key of its own: consilium coordinator enrol FOLDER SITE PUBLIC_KEY"
            raise ConfigError("two sites have the same node key", received=f"{same[0]}, {site}", remedy=remedy)
        found[site] = fingerprint(key)
    return found


def _known_key(public_key: bytes) -> str:
    """Fingerprint of any node's key; "" for what is no key, which is no site's."""
    try:
        return fingerprint(public_key)
    except (ValueError, UnsupportedAlgorithm):
        return ""


@dataclass
class Transport:
    """The seam between the round loop and hospitals. `keys`: site -> fingerprint of its node's key.

    `deadline`, `grace`: seconds a round stays open for everybody, and after that for those that are late. `poll`:
    seconds between two looks. `tell` hears what an engineer wants to see: who is absent, lost, back, or late.
    """

    grid: Grid
    keys: Mapping[str, str]
    deadline: float
    grace: float
    tell: Tell
    poll: float = 1.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    late: dict[str, Sent] = field(default_factory=dict)  # by message, of rounds that were closed without it
    links: dict[str, Link] = field(default_factory=dict)  # of sites that were connected at the last look
    pulls: list[_Pull] = field(default_factory=list)  # that have not ended yet
    aside: list[Message] = field(default_factory=list)  # what they brought, and nobody has asked for in this look
    expected: frozenset[str] = frozenset()  # sites whose late reply may stand for that to the next question

    def sites(self) -> tuple[str, ...]:
        """Names of all sites, sorted, there or not."""
        return tuple(sorted(self.keys))

    def expect(self, sites: Collection[str]) -> None:
        """Replies of these sites to the last question, which come late, may stand for those to the next one."""
        self.expected = frozenset(sites)

    def round(self, requests: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        """Replies as they come; of a site that gave none until deadline and grace, why."""
        asked = _Asked(self, requests, self.clock() + self.deadline + self.grace, self.expected & requests.keys())
        self.expected = frozenset()
        self.give_up(lambda sent: self.clock() >= sent.until, "no reply within one further deadline and grace")
        while asked.open:
            yield from asked.look()
            if not asked.open or self.clock() >= asked.end:
                break
            self.sleep(max(0.0, min(self.poll, asked.end - self.clock())))
        yield from asked.close()

    def look(self) -> None:
        """Note which sites are connected now, and since when."""
        self.aside.clear()
        site_of = {key: site for site, key in self.keys.items()}
        try:
            nodes = [(_known_key(bytes(node.public_key)), node) for node in self.grid.get_nodes()]
        except Exception as error:
            self.stumbled("nodes", error)
            return
        self.links = {site_of[key]: Link(node.node_id, node.last_activated_at) for key, node in nodes if key in site_of}

    def pulled(self, ids: Iterable[str]) -> Iterator[Message]:
        """What came back for these requests, one by one; what Flower cannot give now it may give the next time."""
        wanted = frozenset(ids)
        yield from self._came(wanted)
        for name in sorted(wanted - {each.message for each in self.pulls}):
            pull = _Pull(self.grid, name)
            self.pulls.append(pull)
            pull.join(MOMENT)
            yield from self._came(wanted)
            if pull.error is not None:
                return

    def _came(self, wanted: frozenset[str]) -> Iterator[Message]:
        """What pulls that have ended brought for these requests; what they brought for others is kept for one look."""
        for pull in [each for each in self.pulls if not each.is_alive()]:
            self.pulls.remove(pull)
            if pull.error is not None:
                self.stumbled("pull", pull.error)
            self.aside += pull.found
        found = [each for each in self.aside if each.metadata.reply_to_message_id in wanted]
        self.aside = [each for each in self.aside if each.metadata.reply_to_message_id not in wanted]
        yield from found

    def stumbled(self, doing: str, error: Exception) -> None:
        """A fault of Flower's ends no run: it is said, and the next look tries again, as long as the round is open."""
        self.tell({"event": "stumble", "doing": doing, "message": f"{type(error).__name__}: {error}"})

    def is_gone(self, sent: Sent) -> bool:
        """Whether the node of a request is not there any more, or came back without knowing of it."""
        return self.links.get(sent.site) != sent.link

    def overdue(self, expected: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Replies to rounds that were closed: handed on where they are expected, else said and not used."""
        for message in self.pulled(self.late):
            sent = self.late.pop(message.metadata.reply_to_message_id, None)
            if sent is not None:  # whoever holds a registered key may answer twice
                answer = _too_late(message)
                told = {"policy": "given up", "message": answer} if isinstance(answer, str) else {"bytes": len(answer)}
                counts = isinstance(answer, bytes) and sent.site in expected
                self.tell({"event": "late", "site": sent.site, "policy": "next_round" if counts else "dropped", **told})
                if isinstance(answer, bytes) and counts:
                    yield sent.site, answer
        self.give_up(self.is_gone, "its node went away")

    def give_up(self, is_lost: Callable[[Sent], bool], why: str) -> None:
        """Wait no longer for some of the late replies; their sites are asked again."""
        for name, sent in list(self.late.items()):
            if is_lost(sent):
                del self.late[name]
                self.tell({"event": "late", "site": sent.site, "policy": "given up", "message": why})


class _Pull(threading.Thread):
    """The reply to a request, if it is there. Flower waits for the rest of one that is still on its way, three minutes
    where it was cut in the midst: alone in a call of its own, it keeps no other one waiting."""

    def __init__(self, grid: Grid, name: str) -> None:
        super().__init__(daemon=True)
        self.grid, self.message = grid, name
        self.found: list[Message] = []
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """As a thread."""
        try:
            self.found = list(self.grid.pull_messages([self.message]))
        except Exception as error:
            self.error = error


def read(message: Message) -> bytes | str:
    """A reply, or why there is none; ValueError where it is no message of ours."""
    if message.has_error():
        code = message.error.code
        return f"{'its node went away' if code == NODE_GONE else 'its reply is lost'} (Flower's code {code})"
    record = message.content.get("code")
    if isinstance(record, ConfigRecord):
        return _CODES.get(str(record.get("code")), _CODES["error"])
    return unpack(message.content)


def _too_late(message: Message) -> bytes | str:
    try:
        return read(message)
    except ValueError as error:
        return str(error)


class _Asked:
    """The requests of one question that are not answered yet."""

    def __init__(
        self, transport: Transport, requests: Mapping[str, bytes], end: float, expected: frozenset[str]
    ) -> None:
        self.transport, self.requests, self.end, self.expected = transport, requests, end, expected
        self.open = set(requests)
        self.under_way: dict[str, Sent] = {}  # by message
        self.reasons: dict[str, tuple[str, str]] = {}  # site -> code and why it has not answered so far
        self.failed: dict[str, float] = {}  # site -> when it last did

    def look(self) -> Iterator[tuple[str, bytes | Failure]]:
        """Ask whoever is there and was not asked; hand on what came back since."""
        transport = self.transport
        transport.look()
        for site, late in transport.overdue(self.expected):
            self.open.discard(site)
            yield site, late
        behind = {sent.site for sent in transport.late.values()}
        for site in sorted(self.open - self._working):
            if site not in transport.links:
                self._note(site, "absent", "its node is not connected")
            elif site in behind:  # asked again now, it would answer one round after the other too late
                self._note(site, "late", "it is still at work on an earlier request")
            elif transport.clock() - self.failed.get(site, -AGAIN) >= AGAIN:
                self._ask(site, transport.links[site])
        for message in transport.pulled(self.under_way):
            sent = self.under_way.pop(message.metadata.reply_to_message_id, None)
            answer = self._read(sent.site, message) if sent is not None else None  # who has a key may answer twice
            if sent is not None and answer is not None:
                self.open.discard(sent.site)
                yield sent.site, answer
        for name in [name for name, sent in self.under_way.items() if transport.is_gone(sent)]:
            self._failed(self.under_way.pop(name).site, "its node went away")

    def close(self) -> Iterator[tuple[str, bytes | Failure]]:
        """The round is closed for those who are left: which of them still works, and which was never there."""
        from consilium.protocols import Failure

        self.transport.late |= self.under_way
        for site in sorted(self.open):
            late = "late", f"no reply within {self.transport.deadline:g} s and {self.transport.grace:g} s of grace"
            yield site, Failure(site, *(late if site in self._working else self.reasons[site]))

    @property
    def _working(self) -> set[str]:
        return {sent.site for sent in self.under_way.values()}

    def _ask(self, site: str, link: Link) -> None:
        content, transport = pack(self.requests[site]), self.transport
        span = transport.deadline + transport.grace
        until = self.end + span
        ttl = until - transport.clock() + min(SLACK, span)
        try:
            message = Message(content, link.node, MessageType.TRAIN, ttl=ttl)
            pushed = next(iter(transport.grid.push_messages([message])), None)
        except Exception as error:  # of Flower's, as when its database is busy; an engineer finds the rest in its log
            transport.stumbled("push", error)
            pushed = None
        if pushed is None:
            self._failed(site, "Flower did not take the request")
        else:
            self.under_way[pushed] = Sent(site, link, until)
            status = "back" if self.reasons.pop(site, None) else "asked"
            transport.tell({"event": "link", "site": site, "status": status})

    def _read(self, site: str, message: Message) -> bytes | Failure | None:
        """A reply; or None where the site may yet answer when it is asked again."""
        from consilium.protocols import Failure

        try:
            answer = read(message)
        except ValueError as error:
            return Failure(site, "refused", str(error))
        if isinstance(answer, str):
            self._failed(site, answer)
            return None
        return answer

    def _failed(self, site: str, why: str) -> None:
        self.failed[site] = self.transport.clock()
        self._note(site, "lost", why)

    def _note(self, site: str, code: str, why: str) -> None:
        if self.reasons.get(site) != (code, why):
            self.reasons[site] = code, why
            self.transport.tell({"event": "link", "site": site, "status": code, "message": why})
