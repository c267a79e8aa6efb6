"""Composition: the app that Flower carries. In: a folder. Out: a few lines that import the installed package.

Flower copies an app from the coordinator to every node. This one holds no code of its own, so that what runs at a
hospital is what the hospital installed and looked at.
"""

from __future__ import annotations

from pathlib import Path

from consilium import __version__

FILES = {
    "pyproject.toml": f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "consilium-federation"
version = "{__version__}"
description = "Calls the installed package consilium"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.40"]

[tool.hatch.build.targets.wheel]
packages = ["consilium_federation"]

[tool.flwr.app]
publisher = "consilium"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["consilium_federation/*.py", "LICENSE", "pyproject.toml"]

[tool.flwr.app.components]
serverapp = "consilium_federation.coordinator:app"
clientapp = "consilium_federation.site:app"

[tool.flwr.app.config]
folder = ""
""",
    "LICENSE": "Apache License 2.0, see the package consilium.\n",
    "consilium_federation/__init__.py": "",
    "consilium_federation/site.py": "from consilium.engines import flower\n\napp = flower.client()\n",
    "consilium_federation/coordinator.py": (
        "from consilium.deployment.conduct import conduct\n"
        "from consilium.engines import flower\n\napp = flower.server(conduct)\n"
    ),
}


def write(folder: Path) -> None:
    """The app's files."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
