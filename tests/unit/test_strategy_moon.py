"""MOON: its term in NumPy, what it pulls where, what it is equal to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consilium import registry
from consilium.engines.state import StateFolder
from consilium.errors import ConfigError
from consilium.local.train import Trainer
from consilium.protocols import Personal, Strategy
from consilium.strategies.moon import LAST, contrast
from consilium.tensors import Tensors, equal
from tests import federation

HOSPITALS = federation.hospitals(14, 9, 20)


def _moon(**options: Any) -> Strategy:
    member: Strategy = registry.build("strategies", "moon", options)
    return member


def _run(folder: Path, strategy: Strategy | None = None, **train: Any) -> federation.Outcome:
    return federation.run(folder, federation.configure(train=train), HOSPITALS, strategy=strategy)


def _by_the_paper(z: np.ndarray, shared: np.ndarray, last: np.ndarray, temperature: float) -> float:
    """Equation 3, image by image."""
    found = []
    for row, one, other in zip(z, shared, last, strict=True):
        near, far = (row @ v / np.linalg.norm(row) / np.linalg.norm(v) / temperature for v in (one, other))
        found.append(-np.log(np.exp(near) / (np.exp(near) + np.exp(far))))
    return float(np.mean(found))


def test_the_term_is_the_papers() -> None:
    draw = np.random.default_rng(3)
    z, shared, last = draw.normal(size=(3, 5, 8))
    for temperature in (0.1, 0.5, 2.0):
        found = float(contrast(*(torch.tensor(each, dtype=torch.float32) for each in (z, shared, last)), temperature))
        assert found == pytest.approx(_by_the_paper(z, shared, last, temperature), abs=1e-5)


def test_where_both_models_are_one_the_term_has_no_gradient() -> None:
    """Why a site without a last model can leave it out."""
    z = torch.randn(4, 6, requires_grad=True)
    other = torch.randn(4, 6)
    contrast(z, other, other, 0.5).backward()
    assert float(z.grad.abs().max()) < 1e-7


def test_without_the_term_and_in_a_first_round_it_is_fedavg(tmp_path: Path) -> None:
    fedavg = _run(tmp_path / "fedavg", participation=0.67)
    assert equal(_run(tmp_path / "mu 0", _moon(mu=0), participation=0.67).shared, fedavg.shared)
    assert not equal(_run(tmp_path / "mu 1", _moon(mu=1), participation=0.67).shared, fedavg.shared)
    first = _run(tmp_path / "first", _moon(mu=5), rounds=1)
    assert equal(first.shared, _run(tmp_path / "fedavg first", rounds=1).shared)


def test_a_site_keeps_its_last_model_and_never_sends_more(tmp_path: Path) -> None:
    outcome = _run(tmp_path / "moon", _moon(), rounds=3)
    fedavg = _run(tmp_path / "fedavg", rounds=3)
    assert outcome.progress.ledger.payload == fedavg.progress.ledger.payload
    folder = StateFolder(tmp_path / "moon" / "sites" / "a", outcome.experiment.handshake.agreement)
    state = folder.load(3)
    sent = {
        name: value for number, site, t in outcome.sent("up") if (number, site) == (3, "a") for name, value in t.items()
    }
    assert equal({name.removeprefix(LAST): value for name, value in state.personal.tensors.items()}, sent)
    assert outcome.served("a").keys() == outcome.experiment.model.specs.keys()


def _features(trainer: Trainer, model: Tensors) -> torch.Tensor:
    return trainer.features(model)[0]


def test_it_trains_on_the_papers_objective() -> None:
    """One full-batch step of plain SGD against the gradient of equation 4, written out."""
    train = {**federation.SGD, "rounds": 2, "batch_size": 64}
    pieces = federation.assemble(federation.configure(train=train))
    trainer = Trainer(pieces.setting, HOSPITALS["a"].train, 2, "a", [5, 5, 4])
    received, last = pieces.model.initial(3), pieces.model.initial(4)
    noise = torch.Generator().manual_seed(0)
    last = {name: value + 0.1 * torch.randn(value.shape, generator=noise) for name, value in last.items()}
    own = Personal({f"{LAST}{name}": value for name, value in last.items()})
    learned = _moon(mu=3.0, temperature=0.5).learn(received, own, trainer)
    live = {name: value.clone().requires_grad_() for name, value in received.items()}
    images, labels = _whole(trainer)
    z = pieces.model.features(live, images)
    loss = trainer.setting.task.loss(pieces.model.forward(live, images), labels, [5, 5, 4])
    cos = torch.nn.functional.cosine_similarity
    near = cos(z, pieces.model.features(received, images)) / 0.5
    far = cos(z, pieces.model.features(last, images)) / 0.5
    (loss + 3.0 * -torch.log(near.exp() / (near.exp() + far.exp())).mean()).backward()
    for name, value in live.items():
        if value.grad is not None:
            expected = received[name] - 0.05 * value.grad
            torch.testing.assert_close(learned.update[name], expected, rtol=1e-4, atol=1e-6)


def _whole(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    from consilium.local.predict import load_images

    rows = np.arange(len(trainer.examples))
    images = load_images(trainer.examples, rows, trainer.setting.preprocessing, "cpu")
    return images, torch.from_numpy(trainer.examples.labels)


def test_the_stronger_the_term_the_less_features_leave_the_shared_model() -> None:
    pieces = federation.assemble(federation.configure(train={"local_epochs": 4}))
    received = pieces.model.initial(3)
    last = {name: value + 0.1 for name, value in received.items()}
    own = Personal({f"{LAST}{name}": value for name, value in last.items()})
    gaps = []
    for mu in (0.0, 20.0):
        trainer = Trainer(pieces.setting, HOSPITALS["a"].train, 2, "a", [5, 5, 4])
        update = _moon(mu=mu).learn(received, own, trainer).update
        cosine = torch.nn.functional.cosine_similarity
        away = cosine(_features(trainer, update), _features(trainer, last)).mean()
        near = cosine(_features(trainer, update), _features(trainer, received)).mean()
        gaps.append(float(near - away))
    assert gaps[1] > gaps[0]


@pytest.mark.parametrize(("options", "words"), [({"mu": -1}, "greater than"), ({"temperature": 0}, "greater than 0")])
def test_what_has_no_meaning_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _moon(**options)
