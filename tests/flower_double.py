"""A SuperLink in this process: Flower's `Grid` over plain functions, with nodes that can be away, die, or take long.

Messages go through Flower's own serialisation, so that what does not fit into its records fails here too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from flwr.app import Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_type_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry
from flwr.supercore.task_identity import TaskIdentity

Handler = Callable[[RecordDict], RecordDict]
NODE_UNAVAILABLE = 3  # Flower's code of a node whose heartbeat stopped


@dataclass
class Node:
    """One SuperNode. `takes`: looks of the coordinator that pass before its reply is there."""

    handler: Handler
    online: bool = True
    takes: int = 0
    dies: int = 0  # next requests at which it dies before it answers
    handled: int = 0


@dataclass
class LocalGrid(Grid):
    """Nodes by the comment of their public key."""

    nodes: dict[bytes, Node]
    looks: int = 0
    due: dict[str, tuple[int, Message]] = field(default_factory=dict)  # request -> when its reply is there
    pushed: list[Message] = field(default_factory=list)

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
        return [NodeInfo(node_id=number, public_key=key) for number, (key, node) in known if node.online]

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        found = []
        for message in messages:
            name = f"message-{len(self.pushed)}"
            message.metadata.__dict__["_message_id"] = name
            self.pushed.append(message)
            node = list(self.nodes.values())[message.metadata.dst_node_id - 1]
            self.due[name] = (self.looks + node.takes, self._reply(node, message))
            found.append(name)
        return found

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [name for name in message_ids if name in self.due and self.due[name][0] <= self.looks]
        return [self.due.pop(name)[1] for name in ready]

    def _reply(self, node: Node, message: Message) -> Message:
        if node.dies:
            node.dies -= 1
            return Message(Error(NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
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
