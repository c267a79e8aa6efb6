"""Composition: what to do with new folders. In: an agreement and its folders. Out: a list to work through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from consilium.deployment import files

TEXT = """Made: {folders}

To do, in this order ({guide}):
 1. {coordinator}: keep it on the coordinator's machine. Open port {port} inwards there; nothing else.
 2. The other folders: one to each hospital, by a safe way. A hospital opens nothing inwards; outwards it must reach
    {address} (TCP, TLS).
 3. In earnest: replace keys/ by a certificate of an authority that all trust; let each hospital make its own node key,
    and enrol its public half: consilium coordinator enrol {coordinator} SITE node.key.pub
    What was made here is for trying out: whoever ran this command could read along. It ends after 90 days.
 4. At each hospital: fill in site.toml, then   consilium site join FOLDER
 5. At the coordinator:                         consilium coordinator start {coordinator}
                                                consilium coordinator submit {coordinator} --wait
"""


def checklist(federation: Path, folders: Sequence[Path]) -> str:
    """The list as text."""
    address = files.read_text(federation).deployment.address
    port, names = address.rpartition(":")[2], ", ".join(map(str, folders))
    return TEXT.format(folders=names, coordinator=folders[0], port=port, address=address, guide="docs/deployment.md")
