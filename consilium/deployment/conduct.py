"""Composition: the coordinator of one run. In: its folder and Flower's grid. Out: rounds, checkpoints, a result.

It is the round loop of a simulation over another transport. What it can know of a hospital is what the hospital sent:
tensors that the strategy shares, and the numbers that the page of the run lists. A run that was stopped, at whatever
moment, goes on after the last closed round.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from consilium import checkpoint, results, rounds, run_folder, surroundings
from consilium.config import config_hash
from consilium.coordinator import Coordinator
from consilium.deployment import files, outcome
from consilium.deployment.board import Board
from consilium.deployment.files import Agreement
from consilium.errors import StateError
from consilium.exchange import Patient
from consilium.experiment import Experiment, assemble

if TYPE_CHECKING:
    from consilium.engines.flower import Grid

RUN = files.RUN
LARGE = 1 << 17  # bytes
_TUNE = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
_MMAP_THRESHOLD = -3  # of `mallopt`: blocks as large are mappings of their own; unless it is set, it grows


def conduct(folder: Path, grid: Grid) -> None:
    """Begin the run of a coordinator's folder, or go on with it; what fails is on the board before it is raised."""
    from consilium.engines import flower

    hold_no_free_memory()
    board = Board(folder)
    threading.Thread(target=_end_with, args=(os.getppid(), board), daemon=True).start()
    with board.reporting():
        agreement = files.read(folder)
        settings = agreement.deployment
        keys = flower.fingerprints(files.public_keys(folder, settings))
        transport = flower.Transport(grid, keys, settings.deadline, settings.grace, board.show, poll=settings.poll)
        federate(agreement, transport, folder / RUN, board)


def hold_no_free_memory() -> None:
    """Let blocks as large as a message go back to the system whenever they are free, where the C library knows how.

    Flower fetches every reply in threads of its own, and each leaves its part of the heap in pieces: a process that
    holds no more than before would take more from round to round.
    """
    if _TUNE is not None:
        _TUNE(_MMAP_THRESHOLD, LARGE)


def _end_with(parent: int, board: Board) -> None:
    """End this process when Flower's, which started it, is gone: it would wait for ever for a SuperLink that, once it
    is back, does not know it any more. Closed rounds are on the disk."""
    while os.getppid() == parent:
        time.sleep(1.0)
    board.broke_off("the SuperLink ended: consilium coordinator start, then resume")
    os.kill(os.getpid(), signal.SIGKILL)


def federate(agreement: Agreement, transport: Patient, out: Path, board: Board) -> None:
    """All rounds of the run in `out`, begun or continued."""
    torch.set_num_threads(agreement.config.engine.threads)
    pieces = assemble(agreement.config, agreement.classes)
    with run_folder.claimed(out, resume=True):
        run_folder.clean(out)
        pieces = _named(pieces, _opened(agreement, pieces, out))
        if not run_folder.is_done(out):
            start = {"event": "start", "sites": transport.sites(), "rounds": agreement.config.train.rounds}
            board.show({**start, "closed": max(rounds.numbers(out), default=0)})
            late = agreement.deployment.late
            expect = transport.expect if late == "next_round" else None
            progress = Coordinator(pieces, transport, out, board.show, remote=True, expect=expect).run()
            outcome.write(out, pieces, progress, late)
        if not (out / "report.html").is_file():
            results.report(out)


def _named(pieces: Experiment, run: str) -> Experiment:
    return replace(pieces, handshake=replace(pieces.handshake, run=run))


def _opened(agreement: Agreement, pieces: Experiment, out: Path) -> str:
    """The name of the run, drawn when it begins; StateError where the folder holds a run of another agreement."""
    handshake, path = pieces.handshake, out / run_folder.CONFIG
    identity = {
        "agreement_hash": handshake.agreement,
        "backbone_digest": handshake.backbone,
        "version": handshake.version,
    }
    if not path.is_file():
        hashed = config_hash(agreement.config, handshake.backbone, pieces.backbone.preprocessing)
        facts: dict[str, Any] = {
            "config": agreement.config.to_dict(),
            "config_hash": hashed,
            "classes": agreement.classes,
        }
        checkpoint.write_json(
            path, {**identity, **facts, "run": secrets.token_hex(8), "versions": surroundings.versions()}
        )
    stored = checkpoint.read_json(path)
    different = [key for key, value in identity.items() if stored.get(key) != value]
    if different:
        raise StateError(
            "this folder holds a run of another agreement",
            where=str(out),
            received=f"different: {', '.join(different)}",
            remedy="finish it with the files it was begun with, or move the folder away and begin anew",
        )
    return str(stored["run"])
