"""Consilium: federated fine-tuning of vision foundation models for hospitals.

Every verb of the command line is a function. The modules below load on first use, so that `import consilium` is quick:

    consilium.config.load(path)              a TOML file as one validated value
    consilium.run.run(config, out)           simulate a federation; returns the run folder
    consilium.check.check(config)            what a run would train, send and need
    consilium.predict.predict(run, images)   probabilities with the model a site would use
    consilium.export.export(run, format)     adapters or a merged model for other tools
    consilium.registry.members(kind)         what is registered
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import consilium.check as check
    import consilium.config as config
    import consilium.errors as errors
    import consilium.export as export
    import consilium.predict as predict
    import consilium.registry as registry
    import consilium.run as run

__version__ = "0.1.0"
__all__ = ["__version__", "check", "config", "errors", "export", "predict", "registry", "run"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"consilium.{name}")
    raise AttributeError(f"module 'consilium' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
