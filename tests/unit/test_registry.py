from __future__ import annotations

import pytest
from pydantic import Field

from consilium import registry
from consilium.errors import ConfigError


class Knobs(registry.Options):
    rank: int = Field(default=4, ge=1)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for kind in registry.KINDS:
        registry.members(kind)
    monkeypatch.setattr(registry, "_members", dict(registry._members))


def _register(name: str) -> object:
    @registry.register("tuners", name, options=Knobs, summary="a test's own")
    def build(options: Knobs) -> int:
        return options.rank

    return build


def test_a_registered_member_is_found_validated_and_built() -> None:
    _register("spare")
    assert "spare" in registry.members("tuners")
    assert registry.build("tuners", "spare", {"rank": 7}) == 7
    assert registry.build("tuners", "spare", {}) == 4


def test_a_name_may_be_given_only_once() -> None:
    _register("spare")
    with pytest.raises(ConfigError, match="two tuners are called 'spare'"):
        _register("spare")


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="fedavg") as caught:
        registry.get("strategies", "fedavrg")
    assert caught.value.received == "fedavrg"


@pytest.mark.parametrize(
    ("options", "what", "allowed"),
    [
        ({"ranks": 8}, "unknown key: ranks", "rank"),
        ({"rank": 0}, "this value cannot be used: rank", "greater than or equal to 1"),
        ({"rank": "many"}, "this value cannot be used: rank", "valid integer"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_key_and_remedy(
    options: dict[str, object], what: str, allowed: str
) -> None:
    _register("spare")
    with pytest.raises(ConfigError) as caught:
        registry.build("tuners", "spare", options)
    assert caught.value.what == what
    assert caught.value.where == "tuners.spare"
    assert allowed in str(caught.value.allowed)


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_member_says_what_it_is_and_forbids_unknown_options(kind: registry.Kind) -> None:
    found = registry.members(kind)
    assert found
    for member in found.values():
        assert member.summary
        assert len(member.summary) < 120
        assert member.options.model_config.get("extra") == "forbid"
        assert member.options.model_config.get("frozen") is True
