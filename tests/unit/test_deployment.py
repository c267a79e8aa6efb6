"""Folders of a deployment, the services in them and the coordinator, in one process: same bits, clear refusals."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from consilium import checkpoint, config, messages
from consilium import run as simulation
from consilium.deployment import board, files, init, office
from consilium.engines.kept import claimed
from consilium.engines.resident import REMEMBERED
from consilium.errors import ConfigError, ConsiliumError, StateError, TrainingError
from consilium.messages import envelope_of
from tests import hospitals_apart
from tests.flower_double import LocalGrid
from tests.hospitals_apart import FEDERATION, SITE, SITES, Apart, made

SGD = 'optimizer = "sgd"\nmomentum = 0\nweight_decay = 0\nclip_norm = 0'
CASES = {
    "fedavg": FEDERATION,
    "fedopal": FEDERATION.replace('"fedavg"', '"fedopal_weights"'),
    "scaffold": FEDERATION.replace('"fedavg"', '"scaffold"').replace("[evaluation]", f"{SGD}\n[evaluation]"),
    "flora": FEDERATION.replace('"fedavg"', '"flora"'),
    "ensemble": FEDERATION.replace('"fedavg"', '"ensemble"'),
    "fedpft": FEDERATION.replace('"fedavg"', '"fedpft"').replace('name = "lora"\nrank = 2', 'name = "linear"'),
    "feddpa": FEDERATION.replace('"fedavg"', '"feddpa_t"\ncombine = "instance"'),
    "stochastic_block": FEDERATION.replace('name = "lora"\nrank = 2', 'name = "stochastic_block"'),
    "int8": FEDERATION + '[wire]\ncodec = "int8"\n',
    "int8 without feedback": FEDERATION + '[wire]\ncodec = "int8"\nerror_feedback = false\n',
    "bfloat16": FEDERATION + '[wire]\ncodec = "bfloat16"\n',
    "some of the sites": FEDERATION.replace("rounds = 3", "rounds = 4\nparticipation = 0.67"),
    "moments kept": FEDERATION.replace("rounds = 3", 'rounds = 3\nmoments = "keep"'),
    "best round": FEDERATION.replace("bootstrap = 20", 'bootstrap = 20\nserve = "best"').replace("quorum = 0.6\n", ""),
}


def simulated(folder: Path, federation: str) -> Path:
    """The same federation by `consilium run`."""
    table = config.config_file.tomllib.loads(federation)
    del table["deployment"]
    own = config.config_file.tomllib.loads(SITE)
    settings = config.from_dict({**table, **own, "sites": {**own["sites"], "num_sites": 3}})
    return simulation.run(settings, folder)


def three(text: str) -> str:
    """A hospital's file that draws the phantom as a whole of three sites."""
    return text.replace("num_images = 64", "num_images = 64\nnum_sites = 3")


def rounds(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize("case", CASES)
def test_across_hospitals_and_in_one_process_the_bits_are_the_same(case: str, tmp_path: Path) -> None:
    apart = made(tmp_path, CASES[case], three(SITE))
    out, here = apart.conduct(), simulated(tmp_path / "here", CASES[case])
    ours, theirs = checkpoint.load(rounds(out))[0], checkpoint.load(rounds(here))[0]
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    (state,) = apart.at("alpine").glob("state/*/served.safetensors")
    served, own = checkpoint.load(state)[0], checkpoint.load(here / "sites" / "alpine" / "served.safetensors")[0]
    assert all(torch.equal(served[name], own[name]) for name in own)
    assert board.read(apart.at("coordinator"))["state"] == "finished"


def test_a_hospital_may_encrypt_what_it_keeps_and_the_bits_stay_the_same(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "sealed").mkdir()
    plain, hidden = made(tmp_path / "plain", three_kept), made(tmp_path / "sealed", three_kept)
    key = hidden.at("alpine") / "keys" / "state.key"
    key.touch(mode=0o600)
    key.write_text("5a" * 32)
    own = hidden.at("alpine") / files.SITE
    own.write_text(own.read_text().replace("[engine]", '[engine]\nstate_key_file = "keys/state.key"'))
    ours, theirs = (checkpoint.load(rounds(each.conduct()))[0] for each in (hidden, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (served,) = hidden.at("alpine").glob("state/*/served.safetensors")
    with pytest.raises(StateError):
        checkpoint.load(served)
    (open_one,) = hidden.at("harbour").glob("state/*/served.safetensors")
    assert checkpoint.load(open_one)[0]


three_kept = FEDERATION.replace('"fedavg"', '"fedper"').replace("rounds = 3", 'rounds = 3\nmoments = "keep"')


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    apart = made(tmp_path_factory.mktemp("finished"))
    apart.conduct()
    return apart


def test_the_result_holds_what_hospitals_sent_and_nothing_else(finished: Apart) -> None:
    result = json.loads((finished.run / "result.json").read_text())
    assert result["untested"] == []
    metric = result["metrics"]["test"]["alpine"]["personal"]["accuracy"]
    assert set(metric) == {"value", "low", "high", "n"}
    values = [result["metrics"]["test"][site]["personal"]["accuracy"]["value"] for site in SITES]
    over = result["over_sites"]["test"]["accuracy"]
    assert over["mean"] == pytest.approx(sum(values) / 3)
    assert over["worst"]["value"] == min(values)
    text = "".join(path.read_text(errors="ignore") for path in finished.at("coordinator").rglob("*") if path.is_file())
    ids = finished.residents["alpine"].site.data.test.ids
    assert not any(str(image) in text for image in ids)


def test_one_message_per_site_and_round(finished: Apart) -> None:
    kinds = [(site, envelope_of(asked)["kind"], envelope_of(asked)["round"]) for site, asked, _ in finished.seen]
    assert len(kinds) == len(set(kinds)) == 3 * 4


def test_a_finished_run_is_left_as_it_is(finished: Apart) -> None:
    before, asked = (finished.run / "result.json").read_bytes(), len(finished.seen)
    finished.conduct()
    assert (finished.run / "result.json").read_bytes() == before
    assert len(finished.seen) == asked
    with pytest.raises(StateError, match="finished"):
        office.submit(finished.at("coordinator"))


# ------------------------------------------------------------------------------------------------ twice
def test_a_request_that_comes_twice_gets_the_same_reply(finished: Apart) -> None:
    site, request, reply = next(each for each in reversed(finished.seen) if envelope_of(each[1])["kind"] == "round")
    assert finished.resident(site).answer(request) == reply
    restarted = hospitals_apart.Apart(finished.folder)
    assert restarted.resident(site).answer(request) == reply
    assert [event["event"] for event in restarted.told] == ["repeated"]


def test_replies_do_not_pile_up(finished: Apart) -> None:
    (folder,) = finished.at("alpine").glob("state/*/answers")
    assert len(list(folder.glob("*.reply"))) == REMEMBERED


def test_an_old_round_is_refused_by_name(finished: Apart) -> None:
    site, request, _ = finished.seen[0]
    fields = envelope_of(finished.resident(site).answer(request))
    assert envelope_of(request)["round"] == 1
    assert (fields["failure"]["code"], fields["num_examples"]) == ("stale", 0)


def test_a_reply_that_was_cut_off_on_the_disk_is_made_again(tmp_path: Path) -> None:
    apart = made(tmp_path)
    apart.conduct()
    site, request, reply = next(each for each in reversed(apart.seen) if envelope_of(each[1])["kind"] == "round")
    for path in apart.at(site).glob("state/*/answers/*.reply"):
        path.write_bytes(path.read_bytes()[:100])
    again = apart.resident(site).answer(request)
    numbers = [{**envelope_of(each), "numbers": None} for each in (again, reply)]
    assert numbers[0] == numbers[1]
    assert messages.open_message(again).payload == messages.open_message(reply).payload


def test_a_second_run_of_an_agreement_does_not_meet_the_states_of_the_first(tmp_path: Path) -> None:
    apart = made(tmp_path)
    first = apart.conduct()
    first.rename(first.with_name("run-before"))
    second = apart.conduct()
    assert len(list(apart.at("alpine").glob("state/*/served.safetensors"))) == 2
    one, other = (checkpoint.load(rounds(each))[0] for each in (first.with_name("run-before"), second))
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------ faults
class Killed(BaseException):
    """The coordinator's process ends here."""


@pytest.mark.parametrize("at", [1, 4, 5, 9, 10])
def test_a_coordinator_that_was_killed_goes_on_to_the_same_bits(at: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = made(tmp_path / "whole")
    whole.conduct()
    apart = made(tmp_path / "killed")
    grid = apart.grid()
    handlers = [node.handler for node in grid.nodes.values()]
    count = [0]

    def counting(handler: object) -> object:
        def handle(content: object) -> object:
            count[0] += 1
            if count[0] == at:
                raise Killed
            return handler(content)  # type: ignore[operator]

        return handle

    for node, handler in zip(grid.nodes.values(), handlers, strict=True):
        node.handler = counting(handler)  # type: ignore[assignment]
    with pytest.raises(Killed):
        apart.conduct(grid)
    assert board.read(apart.at("coordinator"))["state"] == "failed"
    out = apart.conduct()
    ours, theirs = checkpoint.load(rounds(out))[0], checkpoint.load(rounds(whole.run))[0]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_site_that_is_away_for_a_round_catches_up(tmp_path: Path) -> None:
    apart = made(tmp_path)
    out = apart.conduct(apart.slow_at_first())
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert lines[0]["sites"]["prairie"]["status"] == "late"
    assert lines[1]["sites"]["prairie"]["status"] == "ok"
    log = (apart.at("coordinator") / "log.jsonl").read_text()
    assert '"event": "late"' in log
    asked = [envelope_of(request) for site, request, _ in apart.seen if site == "prairie"]
    assert [fields["builds_on"] for fields in asked] == [0, 0, 2, 3]  # the state of the late round is not built upon


def test_a_site_that_is_away_at_the_end_leaves_a_result_that_says_so(tmp_path: Path) -> None:
    apart = made(tmp_path)
    grid = apart.grid()
    harbour = list(grid.nodes.values())[1]
    handle = harbour.handler

    def leave(content: object) -> object:
        reply = handle(content)  # type: ignore[arg-type]
        harbour.online = sum(site == "harbour" for site, *_ in apart.seen) < 3
        return reply

    harbour.handler = leave  # type: ignore[assignment]
    result = json.loads((apart.conduct(grid) / "result.json").read_text())
    assert result["untested"] == ["harbour"]
    assert set(result["metrics"]["test"]) == {"alpine", "prairie"}


def test_too_few_sites_stop_the_run_with_names_and_it_can_be_resumed(tmp_path: Path) -> None:
    apart = made(tmp_path)
    gone = {"online": False}
    with pytest.raises(TrainingError, match="too few sites") as caught:
        apart.conduct(apart.grid(alpine=gone, harbour=gone))
    assert "alpine: absent" in str(caught.value)
    table = board.read(apart.at("coordinator"))
    assert (table["state"], table["sites"]["harbour"]["status"]) == ("failed", "absent")
    assert "too few sites" in board.lines(table)[-5:][0]
    apart.conduct()
    assert board.read(apart.at("coordinator"))["state"] == "finished"


def test_another_agreement_is_refused_by_the_site_with_both_digests(tmp_path: Path) -> None:
    apart = made(tmp_path)
    text = (apart.at("prairie") / files.FEDERATION).read_text()
    (apart.at("prairie") / files.FEDERATION).write_text(text.replace("rank = 2", "rank = 3"))
    out = apart.conduct()
    line = json.loads((out / "events.jsonl").read_text().splitlines()[0])
    assert line["sites"]["prairie"]["status"] == "refused"
    assert "do not agree: agreement" in line["sites"]["prairie"]["message"]
    ours = apart.resident("prairie").site.experiment.handshake.agreement
    theirs = apart.resident("alpine").site.experiment.handshake.agreement
    assert ours in line["sites"]["prairie"]["message"]
    assert theirs in line["sites"]["prairie"]["message"]


def test_a_folder_of_another_agreement_is_not_gone_on_with(finished: Apart) -> None:
    folder = finished.at("coordinator")
    text = (folder / files.FEDERATION).read_text()
    (folder / files.FEDERATION).write_text(text.replace("rank = 2", "rank = 3"))
    before = (finished.run / "result.json").read_bytes()
    with pytest.raises(StateError, match="another agreement"):
        finished.conduct(finished.grid())
    (folder / files.FEDERATION).write_text(text)
    assert (finished.run / "result.json").read_bytes() == before


def test_an_error_at_a_site_stays_at_the_site(tmp_path: Path) -> None:
    apart = made(tmp_path)
    resident = apart.resident("prairie")

    class Broken:
        def __getattr__(self, name: str) -> object:
            raise ValueError("patient_JOHN_DOE.dcm unreadable")

        def __len__(self) -> int:
            return 3

    data = replace(resident.site.data, train=Broken())  # type: ignore[arg-type]
    apart.residents["prairie"] = replace(resident, site=replace(resident.site, data=data))
    out = apart.conduct()
    said = [path.read_text(errors="ignore") for path in apart.at("coordinator").rglob("*") if path.is_file()]
    assert not any("JOHN" in text for text in said)
    line = json.loads((out / "events.jsonl").read_text().splitlines()[0])
    assert line["sites"]["prairie"]["status"] == "error"
    assert "JOHN_DOE" in next(apart.at("prairie").glob("state/*/failures.jsonl")).read_text()


def test_one_process_serves_a_folder(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(StateError, match="another process serves"), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


# ------------------------------------------------------------------------------------------------ files
def test_keys_are_for_their_owner_alone(tmp_path: Path) -> None:
    apart = made(tmp_path)
    for path in (apart.at("alpine") / "keys" / "node.key", apart.at("coordinator") / "keys" / "server.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((apart.at("alpine") / "keys").stat().st_mode) == 0o700
    assert files.secret(apart.at("alpine")) == files.secret(apart.at("alpine"))
    (apart.at("alpine") / files.SECRET).unlink()
    drawn = files.secret(apart.at("alpine"))
    assert stat.S_IMODE((apart.at("alpine") / files.SECRET).stat().st_mode) == 0o600
    (apart.at("alpine") / files.SECRET).unlink()
    assert files.secret(apart.at("alpine")) != drawn


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    apart = made(tmp_path)
    with pytest.raises(StateError, match="there already"):
        init.init(tmp_path / "federation.toml", apart.folder)


@pytest.mark.parametrize(
    ("federation", "said"),
    [
        (FEDERATION + '[sites]\nsource = "phantom"\n', "does not say where images lie"),
        (FEDERATION.replace("classes =", "# classes ="), "cannot see each other's classes"),
        (FEDERATION.replace("bootstrap = 20", 'references = ["local"]'), "references need all images"),
        (FEDERATION.replace("bootstrap = 20", 'serve = "best"'), "every site's validation in every round"),
        (FEDERATION.replace('"fedavg"', '"pooled"'), "images do not leave hospitals"),
        (FEDERATION.replace("deadline = 60", "deadlines = 60"), "deadlines"),
        (FEDERATION.replace("deadline = 60", "deadline = 0"), "deadline"),
        (FEDERATION.replace('"prairie"]', '"../x"]'), "names that can be a folder's"),
        (FEDERATION.replace('"prairie"]', '"alpine"]'), "different names"),
        (FEDERATION.replace("grace = 5", 'address = "nowhere"'), "host:port"),
        (FEDERATION.replace('"naevus"', '"naevus\\u001b[8m"'), "signs that cannot be seen"),
        (FEDERATION.replace("[deployment]", '["\\u202Edeployment"]'), "signs that cannot be seen"),
        (FEDERATION.split("[deployment]")[0], "deployment"),
        (FEDERATION + "[engine]\nworkers = 3\n", "these have no effect across hospitals"),
    ],
)
def test_a_wrong_agreement_is_refused_before_anything_is_made(federation: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(federation)
    with pytest.raises(ConfigError) as caught:
        init.init(tmp_path / "federation.toml", tmp_path / "made")
    assert said in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("[train]\nrounds = 9\n", "cannot change the agreement"),
        ("[backbone]\nname = 'vit_base'\n", "cannot change the agreement"),
        ("[sites]\nsource = 'phantom'\nnum_image = 3\n", "num_image"),
        ("[sites]\nsource = 'phantom'\nonly = 'prairie'\n", "a hospital is the site of its own file"),
        ("[engine]\nstacked_sites = 4\n", "these have no effect across hospitals"),
    ],
)
def test_a_site_cannot_change_what_was_agreed_on(site: str, said: str, tmp_path: Path) -> None:
    folder = made(tmp_path).at("alpine")
    (folder / files.SITE).write_text(f'site = "alpine"\n{site}')
    with pytest.raises(ConsiliumError, match=said):
        files.read_site(folder)


def test_a_stranger_is_no_site(tmp_path: Path) -> None:
    apart = made(tmp_path)
    path = apart.at("alpine") / files.SITE
    path.write_text(path.read_text().replace('"alpine"', '"stranger"'))
    with pytest.raises(ConfigError, match="no part of the agreement"):
        files.read_site(apart.at("alpine"))


def test_a_site_without_a_key_is_named(tmp_path: Path) -> None:
    apart = made(tmp_path)
    (apart.at("coordinator") / files.NODES / "harbour.pub").unlink()
    with pytest.raises(ConfigError, match="sites without a key"):
        apart.conduct(LocalGrid({}))
    private = apart.at("harbour") / "keys" / "node.key"
    with pytest.raises(ConfigError, match="no public key"):
        office.enrol(apart.at("coordinator"), "harbour", private)
    office.enrol(apart.at("coordinator"), "harbour", apart.at("harbour") / "keys" / "node.key.pub")
    assert files.public_keys(apart.at("coordinator"), files.deployment(apart.at("coordinator")))


def test_a_run_whose_process_died_is_said_to_have_died(tmp_path: Path) -> None:
    folder = made(tmp_path).at("coordinator")
    table = {"state": "running", "round": 2, "sites": {}, "time": "2020-01-01T00:00:00.000+00:00"}
    (folder / board.STATUS).write_text(json.dumps(table))
    assert office.status(folder)["state"] == "died"
