"""A node that answers a request again, with something else: right after its reply, and once more after the next one.

Flower's own program, changed by whoever runs it at a hospital: NOTES, then Flower's words. NOTES gets a line of JSON
per answer too many: when it was sent, and of how many of its parts the SuperLink asked for the bytes.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.supercore.inflatable import inflatable_object as objects
from flwr.supernode import start_client_internal as node

from consilium.deployment import watch
from consilium.engines import flower


def twin(reply: Message) -> Message:
    """Another answer to the same request, as whole as the first."""
    metadata = copy.deepcopy(reply.metadata)
    metadata.__dict__["_message_id"] = ""
    found = Message.__new__(Message)
    found.__dict__.update({"_metadata": metadata, "_content": flower.pack(b"another answer" * 100), "_error": None})
    metadata.__dict__["_message_id"] = found.object_id
    return found


def main() -> None:
    """The node, with a habit."""
    notes, push, before = Path(sys.argv.pop(1)), node._push_messages, list[Message]()

    def again(when: str, message: Message, send: Any, push_object: Any) -> None:
        other = twin(message)
        wanted, session = send(other, objects.get_object_tree(other), 1.0)
        with notes.open("a") as file:
            file.write(json.dumps({"when": when, "wanted": len(wanted)}) + "\n")
        for name, part in objects.get_all_nested_objects(other).items():
            if name in wanted:
                push_object(message.metadata.run_id, session, name, part.deflate())

    def pushing(state: Any, object_store: Any, send: Any, push_object: Any) -> None:
        now = list[Message]()

        def noting(message: Message, *others: Any) -> Any:
            now.append(message)
            return send(message, *others)

        push(state, object_store, noting, push_object)
        for message in now:
            again("at once", message, send, push_object)
        for message in before:
            again("a round later", message, send, push_object)
        before[:] = now

    node._push_messages = pushing
    watch.main()


if __name__ == "__main__":
    main()
