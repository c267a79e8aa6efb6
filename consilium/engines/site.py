"""Engine: a hospital's side of a run. In: the bytes of a request. Out: the bytes of a reply.

`Site.handle` is the same function in a simulation and in a deployment. It checks the handshake before it touches data,
evaluates what came in (validation data only), trains, evaluates what goes out. What must survive lies on the site's own
disk; a request names the state it builds on, so a request that comes twice gives the same reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from consilium import checkpoint, instances, members, seeds, stages
from consilium.data import Examples, SiteData
from consilium.engines import failures
from consilium.engines.state import SiteState, StateFolder
from consilium.errors import ConsiliumError, TrainingError, WireError
from consilium.experiment import Experiment
from consilium.local.predict import outputs, pooled_features
from consilium.local.prefix import FEW, Prefixes
from consilium.local.seats import Seat
from consilium.local.train import Setting, Trainer
from consilium.messages import (
    Reply,
    Request,
    check_learned,
    check_request,
    decode_request,
    encode,
    is_count,
    open_message,
)
from consilium.metrics import without_nan
from consilium.protocols import Failure, Fitted, Learned, Personal
from consilium.sealing import sealed
from consilium.tensors import Tensors, digest_all, equal, non_finite

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Site:
    """One hospital. `secret` seeds its personal tensors; in a deployment only the hospital knows it. `seat`: its place
    among the sites that a simulation stacks with it."""

    experiment: Experiment
    data: SiteData
    folder: Path
    secret: int
    seat: Seat | None = None

    def handle(self, data: bytes) -> bytes:
        """Answer a request; whatever goes wrong becomes a reply that names the failure."""
        fields: Mapping[str, Any] = {}
        try:
            opened = open_message(data)
            fields = opened.fields
            self._agree(fields)
            check_request(fields, self.experiment.setting.config.rounds)
            request = decode_request(opened, self.experiment.wire("down", int(fields["round"]), self.data.name))
            self._accept(request)
            if request.kind != "finish" or _trains(request):  # who took no part only looks at the model
                self._stay_home()
        except WireError as error:  # the site's data are untouched: this speaks of the message alone
            return encode(self._failed(fields, "refused", str(error)), {})
        except Exception as error:
            return self._sealed(fields, error)
        try:
            reply = self._answer(request)
            return encode(reply, self.experiment.wire("up", reply.round, self.data.name))
        except Exception as error:
            return self._sealed(fields, error)

    def _answer(self, request: Request) -> Reply:
        return {"describe": self._describe, "round": self._round, "evaluate": self._evaluate, "finish": self._finish}[
            request.kind
        ](request)

    def _sealed(self, fields: Mapping[str, Any], error: Exception) -> bytes:
        """A failure whose text, which may name files or images, stays in the site's folder; its digest travels."""
        known = isinstance(error, ConsiliumError)
        code = "non_finite" if isinstance(error, TrainingError) else "refused" if known else "error"
        text = str(error) if known else f"{type(error).__name__}: {error}"
        return encode(self._failed(fields, code, failures.seal(self.folder, text)), {})

    def _failed(self, fields: Mapping[str, Any], code: str, message: str) -> Reply:
        number = fields.get("round")
        failure = Failure(self.data.name, code, message)
        return Reply(self.data.name, number if is_count(number) else 0, 0, failure=failure)

    def _agree(self, fields: Mapping[str, Any]) -> None:
        """WireError unless the request is for this site, from the same version, agreement and backbone."""
        ours, theirs, site = self.experiment.handshake, fields.get("handshake"), fields.get("site")
        if site != self.data.name:
            raise WireError("this request is for another site", allowed=self.data.name, received=f"{site!r:.80}")
        theirs = theirs if isinstance(theirs, Mapping) else {}
        for key in ("version", "backbone", "agreement"):  # the agreement's digest covers the backbone's
            if getattr(ours, key) != theirs.get(key):
                remedy = "all sites and the coordinator need the same package, configuration and weights"
                raise WireError(
                    f"coordinator and site do not agree: {key}",
                    where=f"site {site}",
                    allowed=getattr(ours, key),
                    received=theirs.get(key),
                    remedy=remedy,
                )

    def _accept(self, request: Request) -> None:
        """WireError where class counts come that the task does not want, or not those that it wants."""
        wanted = (request.kind == "round" or _trains(request)) and self._counts_travel
        counts = request.context.get("class_counts")
        fits = (
            isinstance(counts, list) and len(counts) == len(self.experiment.task.classes) and all(map(is_count, counts))
        )
        if not fits if wanted else "class_counts" in request.context:
            allowed = f"{len(self.experiment.task.classes)} counts" if wanted else "none: task.class_counts is 'site'"
            raise WireError(f"these class counts do not fit a '{request.kind}'", allowed=allowed, received=counts)

    def _stay_home(self) -> None:
        """WireError where the strategy wants images of all sites in one place, and these are a hospital's own."""
        if self.experiment.strategy.declares.pools_images and self.data.name in self.data.train.origins:
            remedy = "choose another strategy; a simulation may pool images"
            raise WireError("images do not leave this site", where=f"site {self.data.name}", remedy=remedy)

    @property
    def _counts_travel(self) -> bool:
        """Whether the task, which both ends agreed on, makes sites send their class counts."""
        return self.experiment.task.class_counts == "federation"

    # -------------------------------------------------------------------------------------------- requests
    def _describe(self, request: Request) -> Reply:
        numbers = {"class_counts": self._class_counts()} if self._counts_travel else {}
        return Reply(self.data.name, request.round, len(self.data.train), numbers=numbers)

    def _round(self, request: Request) -> Reply:
        started = perf_counter()
        newest = max(self._states.rounds(), default=0)
        if request.round < newest - 1:  # a coordinator that lost its last checkpoint asks for one round again, not more
            message = f"round {request.round} was asked for, but round {newest} is done"
            return Reply(self.data.name, request.round, 0, failure=Failure(self.data.name, "stale", message))
        state = self._state(request)
        validated = bool(request.context.get("validate", True))
        depth = self._depth(request.round)
        incoming = self._validated(state.received, state.personal, state.validated, depth) if validated else {}
        moments = dict(state.moments)
        learned = self._learn(request, state, moments)
        broken = non_finite(learned.update) or non_finite(learned.personal.tensors)
        if broken:
            message = f"round {request.round}: NaN or infinity in {', '.join(broken[:3])}"
            return Reply(self.data.name, request.round, 0, failure=Failure(self.data.name, "non_finite", message))
        sent = {**state.received, **learned.update}
        outgoing = self._validated(sent, learned.personal, incoming, depth) if validated else {}
        declared = self.experiment.up(request.round, self.data.name)
        wire, left = self.experiment.codec.reply(learned.update, state.received, state.residual, declared)
        after = SiteState(request.round, state.received, learned.personal, learned.update, moments, left, outgoing)
        self._states.save(after, keep={request.builds_on, *request.context.get("keep", ())})
        numbers = {
            "loss": learned.loss,
            "num_steps": learned.num_steps,
            "image_passes": learned.image_passes,
            "seconds": perf_counter() - started - (self.seat.idle if self.seat else 0.0),
            "val": {"incoming": incoming.get("numbers", {}), "outgoing": outgoing.get("numbers", {})},
            **({"learned": dict(learned.numbers)} if learned.numbers else {}),
        }
        check_learned(numbers, self.experiment.strategy.declares.numbers)
        return Reply(self.data.name, request.round, len(self.data.train), wire, numbers)

    def _evaluate(self, request: Request) -> Reply:
        state = self._state(request)
        numbers = {"val": {"incoming": self._validated(state.received, state.personal, state.validated)["numbers"]}}
        return Reply(self.data.name, request.round, len(self.data.train), numbers=numbers)

    def _finish(self, request: Request) -> Reply:
        """Read the test split, once, with the models that will be used, and leave them on the site's disk; where
        another stage follows, it stays unread."""
        held, state = self._held(request), self._state(request)
        models = dict(self.experiment.strategy.deploy(state.received, state.personal))
        numbers: Numbers = {"image_passes": 0, "seconds": 0.0}
        if _trains(request):
            started = perf_counter()
            fitted = self._last_phase(request, instances.plain(models["personal"]))
            numbers = {"image_passes": fitted.image_passes, "seconds": perf_counter() - started}
            models["personal"] = {**models["personal"], **fitted.variables}
        if held.sent:  # beside what it was trained with: the last sum may have changed more than what was sent
            before = self.experiment.strategy.deploy({**held.received, **held.sent}, held.personal)
            models["before_aggregation"] = before["personal"]
        models = {name: self.with_features(variables) for name, variables in models.items()}
        tables: dict[str, pd.DataFrame] = {}
        for name, variables in models.items():
            same = next((known for known in tables if equal(models[known], variables)), None)
            tables[name] = self.predicted(variables, _tests(request)) if same is None else tables[same]
        self.folder.mkdir(parents=True, exist_ok=True)
        table = stack([rows.assign(model=name) for name, rows in tables.items()])
        checkpoint.write_bytes(self.folder / "predictions.parquet", table.to_parquet(index=False))
        seal = sealed("model", self._states.key, self._states.agreement, self.data.name)
        checkpoint.save(self.folder / "served.safetensors", models["personal"], {"round": request.round}, seal)
        if request.context.get("metrics"):  # of a coordinator that cannot read this folder
            numbers["metrics"] = self._tested(table)
        return Reply(self.data.name, request.round, len(self.data.train), numbers={**numbers, "models": sorted(models)})

    def _tested(self, table: pd.DataFrame) -> Numbers:
        """{split: {model: {metric: value with its interval}}} of this site's images."""
        config, task = self.experiment.config, self.experiment.task
        settings: Any = {"bootstrap": config.evaluation.bootstrap, "seed": config.seed, "sites": [self.data.name]}
        groups = table.groupby(["split", "model"])
        found: Numbers = {"val": {}, "test": {}}
        for (split, model), rows in groups:
            tree = task.metrics(rows, **settings)
            found[str(split)][str(model)] = without_nan({name: entry["pooled"] for name, entry in tree.items()})
        return found

    # -------------------------------------------------------------------------------------------- pieces
    @property
    def _states(self) -> StateFolder:
        agreement = self.experiment.handshake.agreement
        return StateFolder(self.folder, agreement, self.experiment.state_key, self.data.name)

    def _held(self, request: Request) -> SiteState:
        """The state this request builds on."""
        if request.builds_on:
            return self._states.load(request.builds_on)
        initial = {**self.experiment.initial(self.secret), **stages.start(self.folder, self.experiment, self.data.name)}
        specs = self.experiment.model.specs
        personal = self.experiment.strategy.init_site(initial, specs, self.data.name)
        return SiteState(0, self.experiment.common_at(self.data.name), personal)

    def _state(self, request: Request) -> SiteState:
        """The same with what the request brought."""
        state = self._held(request)
        declared = self.experiment.down(request.round, self.data.name)
        news = self.experiment.codec.read(request.tensors, state.received, declared)
        return replace(state, received={**state.received, **news})

    def _learn(self, request: Request, state: SiteState, moments: dict[str, Any]) -> Learned:
        trainer = self._trainer(request, self.experiment.setting, moments)
        learned = self.experiment.strategy.learn(state.received, state.personal, trainer)
        silent = self.experiment.strategy.declares.once and request.round < self.experiment.setting.config.rounds
        return replace(learned, update={}) if silent else learned

    def _last_phase(self, request: Request, variables: Tensors) -> Fitted:
        """Train the model to use on, at this site alone: all that the tuners train, on a schedule of its own, as that
        of the rounds ends near zero."""
        setting, declares = self.experiment.setting, self.experiment.strategy.declares
        schedule = setting.config.schedule.model_copy(update={"restart": True})
        config = setting.config.model_copy(update={"schedule": schedule, "moments": "reset"})
        alone = replace(setting, config=config, trains=lambda tag, round: declares.finishes(tag))  # noqa: ARG005
        return self._trainer(request, alone, {}).fit(variables, epochs=declares.finish_epochs, purpose="finish")

    def with_features(self, variables: Tensors) -> Tensors:
        """Where adapters are weighed by likeness to the site's images: with features of some, always the same ones."""
        if instances.MOST not in variables:
            return variables
        setting, train = self.experiment.setting, self.data.train
        draw = seeds.numpy_generator(setting.seed, site=self.data.name, purpose="instances")
        chosen = train.at(np.sort(draw.permutation(len(train))[: self.experiment.strategy.declares.instances]))
        model = instances.alone(setting.model.specs, variables)
        found = pooled_features(setting.model, model, chosen, setting.preprocessing, setting.device)
        return {**variables, instances.FEATURES: found}

    def _trainer(self, request: Request, setting: Setting, moments: dict[str, Any]) -> Trainer:
        counts = request.context["class_counts"] if self._counts_travel else self._class_counts()
        name, train = self.data.name, self.data.train
        return Trainer(setting, train, request.round, name, counts, moments, self._prefixes, self.seat)

    @cached_property
    def _prefixes(self) -> Prefixes | None:
        """One place for all models and splits of a request: what they have in common below is computed once."""
        return self.experiment.setting.prefixes()

    def _depth(self, round: int) -> int:
        """Up to which depth a model that comes in and the one that goes out are the same."""
        return 0 if self._prefixes is None else self._prefixes.depth(self.experiment.active(round, self.data.name))

    def _class_counts(self) -> list[int]:
        counts = np.bincount(self.data.train.labels, minlength=len(self.experiment.task.classes))
        return [int(count) for count in counts]

    def _validated(
        self, received: Tensors, personal: Personal, known: Mapping[str, Any], depth: int | None = None
    ) -> Mapping[str, Any]:
        """{"of": the digest of a model, "numbers": of its validation}; `known` where that is of this very model."""
        variables = self.with_features(self.experiment.strategy.deploy(received, personal)["personal"])
        of = f"{digest_all(variables)}-{depth}"  # what is computed in two parts may have other last bits on a GPU
        return known if known.get("of") == of else {"of": of, "numbers": self._validate(variables, depth)}

    def _validate(self, variables: Tensors, depth: int | None) -> Numbers:
        val = self.data.val
        found = self.experiment.task.validation(self._probabilities(variables, val, depth), val.labels)
        return {name: without_nan(float(value)) for name, value in found.items()}

    def _probabilities(self, variables: Tensors, examples: Examples, depth: int | None = None) -> Any:
        """Of one split; `depth`: up to where other models of this request are the same, if not up to where all are."""
        setting, task = self.experiment.setting, self.experiment.task
        if not len(examples):
            return np.zeros((0, len(task.classes)))
        precision, image = setting.config.precision, setting.preprocessing

        def one(model: Tensors) -> Tensor:
            prefix = None
            if self._prefixes is not None:
                common = self._prefixes.lasting if depth is None else depth
                prefix = self._prefixes.split(instances.plain(model), examples, common, precision)
            return outputs(setting.model, model, examples, image, setting.device, precision, prefix)

        return members.probabilities(variables, one, task.probabilities).numpy()

    def predicted(self, variables: Tensors, both: bool = True) -> pd.DataFrame:
        """What a model says of validation and, if `both`, test images: split, site, id, group, label, p.<class>."""
        if not both:
            return self._predictions("val", self.data.val, self._probabilities(variables, self.data.val))
        val, test, joint = self.data.val, self.data.test, self._joint
        if joint is not None:
            found = self._probabilities(variables, joint)
            parts = found[: len(val)], found[len(val) :]
        else:
            parts = self._probabilities(variables, val), self._probabilities(variables, test)
        return stack([self._predictions("val", val, parts[0]), self._predictions("test", test, parts[1])])

    @cached_property
    def _joint(self) -> Examples | None:
        """Validation and test images in one, where they are few and one pass gives the bits of two: on a processor, for
        blocks with whole registers (`halves`), and never for one image, which a linear layer treats in its own way."""
        val, test, setting = self.data.val, self.data.test, self.experiment.setting
        small = min(len(val), len(test)) > 1 and len(val) + len(test) <= FEW and val.shares(test)
        config = self.experiment.config
        plain = (setting.device, setting.config.precision, config.engine.compile, config.head.kind)
        kept = self._prefixes is not None and self._prefixes.lasting > 0  # by split, for other rounds and runs
        if not small or plain != ("cpu", "float32", False, "linear") or kept:
            return None
        halves = setting.model.halves
        return val.and_(test) if halves is not None and halves.even == halves.deepest else None

    def _predictions(self, split: str, examples: Examples, probabilities: Any) -> pd.DataFrame:
        columns = {
            "split": split,
            "site": examples.origins,
            "id": examples.ids,
            "group": examples.groups,
            "label": examples.labels,
        }
        scores = {f"p.{name}": probabilities[:, at] for at, name in enumerate(self.experiment.task.classes)}
        return pd.DataFrame({**columns, **scores}, index=range(len(examples)))


def _trains(request: Request) -> bool:
    """Whether the end of a run brings a last local phase; guests, who took no part, are not asked for one."""
    return request.kind == "finish" and bool(request.context.get("train"))


def _tests(request: Request) -> bool:
    """Whether the run is at its end; not so where another stage begins with what this one ends with."""
    return bool(request.context.get("test", True))


def stack(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of predictions below one another; pandas warns of empty ones, so they stay out unless all are empty."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
