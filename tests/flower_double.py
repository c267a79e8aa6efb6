"""A SuperLink in this process: Flower's `Grid` over plain functions, with nodes that can be away, die, or take long.

Messages go through Flower's own serialisation, so that what does not fit into its records fails here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry
from flwr.supercore.task_identity import TaskIdentity

from consilium.engines import flower

Handler = Callable[[RecordDict], RecordDict]
GONE, NODE_UNAVAILABLE = 3, 5  # Flower's codes: a request whose time is over, a node whose heartbeat stopped


@dataclass
class Node:
    """One SuperNode, which works on one message at a time. `takes`: looks of the coordinator that pass before its reply
    is there; `since`: changes whenever it connects anew."""

    handler: Handler
    online: bool = True
    takes: int = 0
    dies: int = 0  # next requests at which it dies before it answers
    handled: int = 0
    since: int = 0
    waiting: list[Message] = field(default_factory=list)
    work: tuple[int, Message] | None = None  # when the reply is there, and it

    def restart(self) -> None:
        """Die and come back between two looks: what it worked on is lost."""
        self.since, self.work = self.since + 1, None


@dataclass
class LocalGrid(Grid):
    """Nodes by the comment of their public key. A look is a second, when it comes to the life of a message."""

    nodes: dict[bytes, Node]
    looks: int = 0
    until: dict[str, float] = field(default_factory=dict)  # message -> last look at which anybody gets it
    to: dict[str, Node] = field(default_factory=dict)
    replies: dict[str, Message] = field(default_factory=dict)
    pushed: list[Message] = field(default_factory=list)  # without contents: Flower keeps none either

    def __post_init__(self) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # whose messages these are

    def set_run(self, run: object) -> None:
        raise NotImplementedError

    @property
    def run(self) -> object:
        raise NotImplementedError

    def create_message(self, *arguments: object, **named: object) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_nodes(self) -> Iterable[NodeInfo]:
        self.looks += 1
        known = enumerate(self.nodes.items(), start=1)
        return [
            NodeInfo(node_id=number, public_key=key, last_activated_at=str(node.since))
            for number, (key, node) in known
            if node.online
        ]

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found = []
        for message in messages:
            name = f"message-{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed.append(remove_content_from_message(message))
            self.until[name] = self.looks + message.metadata.ttl
            self.to[name] = list(self.nodes.values())[message.metadata.dst_node_id - 1]
            self.to[name].waiting.append(message)
            self._work(self.to[name])
            found.append(name)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for name in message_ids:
            self._work(self.to[name])
            if self._is_over(name):
                found.append(self._error(name, GONE))
            elif not self.to[name].online:
                found.append(self._error(name, NODE_UNAVAILABLE))
            elif name in self.replies:
                found.append(self.replies.pop(name))  # nobody gets it a second time
        return found

    def _is_over(self, name: str) -> bool:
        return self.looks >= self.until[name]

    def _error(self, name: str, code: int) -> Message:
        (message,) = (each for each in self.pushed if each.metadata.message_id == name)
        return Message(Error(code, "as Flower says"), reply_to=message)

    def _work(self, node: Node) -> None:
        """What a node does until now; a request whose time is over is never handed out, its reply never taken."""
        while node.work or node.waiting:
            if node.work is None:
                message = node.waiting.pop(0)
                if not self._is_over(message.metadata.message_id):
                    node.work = (self.looks + node.takes, self._reply(node, message))
            elif node.work[0] > self.looks:
                return
            else:
                reply, node.work = node.work[1], None
                self.replies[reply.metadata.reply_to_message_id] = reply

    def _reply(self, node: Node, message: Message) -> Message:
        if node.dies:
            node.dies -= 1
            return self._error(message.metadata.message_id, NODE_UNAVAILABLE)
        node.handled += 1
        return Message(node.handler(_carried(message.content)), reply_to=message)


def _carried(content: RecordDict) -> RecordDict:
    """The same after Flower's serialisation, an object of it after the other."""
    objects = {name: each.deflate() for name, each in get_all_nested_objects(content).items()}
    return _inflated(objects, content.object_id)


def _inflated(objects: dict[str, bytes], name: str) -> RecordDict:
    children = {each: _inflated(objects, each) for each in get_object_children_ids_from_object_content(objects[name])}
    kind = inflatable_class_registry[get_object_type_from_object_content(objects[name])]
    return kind.inflate(objects[name], children)


# ------------------------------------------------------------------------------------------------ a transport over it
@dataclass
class Clock:
    """Time that passes when somebody sleeps."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)


@lru_cache
def key(site: str) -> bytes:  # noqa: ARG001
    """A public key as Flower keeps it, of this site's node."""
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def transport(grid: LocalGrid, told: list[Mapping[str, Any]], **settings: float) -> flower.Transport:
    clock = Clock()
    keys = {site: flower.fingerprint(key(site)) for site in "abc"}
    times = {"deadline": 100.0, "grace": 10.0, **settings}
    return flower.Transport(grid, keys, **times, tell=told.append, clock=clock, sleep=clock.sleep)


def echoing(**nodes: Any) -> LocalGrid:
    """Nodes that answer with the request and their own name."""

    def handler(site: str) -> Any:
        return lambda content: flower.pack(flower.unpack(content) + site.encode())

    return LocalGrid({key(site): Node(handler(site), **options) for site, options in nodes.items()})
