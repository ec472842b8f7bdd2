"""The engine: what a user sees. It ties sampling, step, noise and ledger together, and keeps what was spent."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpkit.accountants import Accountant, make_accountant

from . import checkpoint, checks
from .clipping import Clipping, NormHistogram, clipping_of
from .correlated import Correlated, Correlation
from .errors import CheckpointError, ConfigurationError, NotAttachedError
from .facts import Lives, lives_in, stated
from .ledger import Ledger
from .loader import Limit, PrivateDataLoader, refuse_private
from .memory import keep_freed
from .methods import MODES, Profile, free_bytes
from .noise import Source, source_of
from .optimizers import innermost
from .optional import register_optional
from .paced import CyclicPoisson, paced
from .ranks import Ranks, is_first
from .sampling import checked, sampling_of
from .scaler import LossScale
from .secure import SecureNoise
from .seeds import unforeseeable
from .spending import Spending
from .state import Part, Stateful, collect, give_back, refuse_others
from .statement import Statement
from .step import PrivateStep
from .targets import budget_for, noise_multiplier_for
from .together import begin_together, refuse_own_sizes
from .units import PrivacyUnit, refuse_reordering, units_of

log = logging.getLogger("dpkit")
_trained: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""The run that has trained a model in this process, and was detached."""
M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer)  # noqa: E741


class PrivacyEngine:
    """Makes an existing training loop differentially private.

    Guarantee: after any number of optimizer steps, the weights are (ε, δ)-differentially private with
    ε = ``get_epsilon(delta)``, for neighbouring data sets that differ by adding or removing one record (by zeroing one
    out, with ``poisson_sampling=False``; one unit, with ``privacy_unit``), as long as each record's loss depends on
    that record alone. The strict door, ``engine.backward(losses)``, checks that assumption; of a plain
    ``loss.backward()`` all is checked but constants in the loss. Everything else is checked in any case or refused.

    Args:
        accountant: the judge of what was spent: "pld" (tight), "rdp" (quick, some 5 to 15% above), or a
            `dpkit.accountants.Accountant`.
        secure_mode: draw the noise from a cryptographic generator and round it so that floating point tells nothing;
            see `dpkit.secure` for what is proven. Needs the extra ``dpkit[secure]``, and costs some six times the
            plain noise, on the processor.
        ledger: a file that holds every release of every run on this data set (`dpkit budget` reads it). Each is on the
            disk before the weights that contain it are handed out, so that no crash forgets what was spent.

    >>> engine = PrivacyEngine()                                                            # doctest: +SKIP
    >>> model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer,
    ...     data_loader=loader, noise_multiplier=1.1, max_grad_norm=1.0)
    """

    def __init__(
        self,
        accountant: str | Accountant = "pld",
        secure_mode: bool = False,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        self._secure = SecureNoise() if checks.flag("secure_mode", secure_mode) else None
        if not isinstance(accountant, str | Accountant):
            raise ConfigurationError(
                f"accountant is a {type(accountant).__name__}",
                why="ε is its answer.",
                cure='pass "pld", "rdp" or a dpkit.accountants.Accountant.',
            )
        self.accountant = accountant if isinstance(accountant, Accountant) else make_accountant(accountant)
        if self.accountant.is_estimate:
            raise ConfigurationError(
                f"accountant={self.accountant!r}",
                why="its answers are estimates, often far below the truth; no guarantee may rest on them.",
                cure='use accountant="pld".',
            )
        self._spending = Spending(
            self.accountant, None if ledger is None or not is_first() else Ledger(ledger, self.accountant.adjacency)
        )
        self._step: PrivateStep | None = None
        self._before = 0
        self._lives = Lives(self._spending)
        self._target_delta: float | None = None
        self._cyclic = False  # whether records took turns: then group privacy is not known

    @property
    def nonfinite_records(self) -> int:
        """Records whose gradient was not finite and was replaced by zero. Not covered by ε: do not publish it."""
        return self._before + (self._step.nonfinite_records if self._step is not None else 0)

    # ---------------------------------------------------------------- attaching

    def make_private(
        self,
        module: M,
        optimizer: O,
        data_loader: DataLoader[Any],
        *,
        max_grad_norm: float,
        noise_multiplier: float | None = None,
        target_epsilon: float | None = None,
        target_delta: float | None = None,
        epochs: int | None = None,
        steps: int | None = None,
        max_epsilon: float | None = None,
        clipping: str | Clipping = "flat",
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        max_physical_batch_size: int | str | None = None,
        memory_budget: int | None = None,
        method: str = "auto",
        noise_generator: torch.Generator | None = None,
        batch_first: bool = True,
        privacy_unit: PrivacyUnit | None = None,
        max_rows_per_unit: int | None = None,
        unit_reduction: str = "mean",
        augmentations: int = 1,
        grad_scaler: torch.amp.GradScaler | None = None,
        noise: Correlation | None = None,
    ) -> tuple[M, O, PrivateDataLoader]:
        """Attach to a model, its optimizer and its data; returns the same model and optimizer, and a private loader.

        Args:
            module: the model. It stays as it is; hooks observe it while the loader's batches are in the user's hands.
                Attention, recurrent layers and bags need no conversion: they are taken apart inside the forward. What
                has to be another function (BatchNorm) is refused; `dpkit.layers.convert` replaces it.
            optimizer: any torch optimizer whose ``step`` needs its closure once at most. One that another library has
                wrapped (and holds as ``optimizer.optimizer``) comes back as it is.
            data_loader: a DataLoader over a map-style dataset; its batch size B gives the sampling rate q = B / N.
            max_grad_norm: C, the bound on each record's gradient norm.
            noise_multiplier: σ, the noise's standard deviation divided by C; or leave it out and give
            target_epsilon, target_delta, and epochs or steps: the least σ that keeps within them is found.
            max_epsilon: a hard budget at target_delta, for everything in the ledger where there is one: the loader ends
                before a step would exceed it (see `budget_spent`). It holds for any stopping time, and for schedules of
                σ that were fixed in advance; not for a σ that is chosen in view of the training.
            clipping: "flat", "automatic", "per_layer", "adaptive" (`AdaptiveClipping`: max_grad_norm is where C starts,
                and σ covers what C is learned from), "histogram" (`HistogramClipping`: flat, and σ covers a histogram
                of the norms), or an object with ``weights`` and ``sensitivity``.
            loss_reduction: whether the loss that is back-propagated is the "mean" or the "sum" over the batch.
            poisson_sampling: draw each record independently (amplification is accounted); if False, the loader's own
                batches are kept and no amplification is claimed.
            max_physical_batch_size: serve a logical batch in parts of at most this many records. Call
                ``optimizer.step()`` after each part as usual; only the last one of a logical batch takes the step. A
                scheduler that is stepped beside it counts parts; ``loader.logical_batches()`` counts steps. "auto": as
                many as fit into the memory budget, found from the first batch, which is served in small parts.
            memory_budget: bytes that a step may take with "auto", by default half of what is free on the model's
                device. It is met by an estimate, not enforced.
            method: how norms and sums are computed, where several ways give the same: "model" takes the cheapest by a
                cost model, "measured" times them when a layer is first met, "auto" does so where the model is not sure
                (with a noise_generator or a ledger it follows the model, so that runs repeat bit for bit).
            noise_generator: for runs that repeat exactly; by default the noise is seeded from the operating system. So
                is the draw of records, unless the data loader has a generator of its own.
            batch_first: False if the model's inputs are [t, n, ...].
            privacy_unit: whose presence ε is about, if one user, patient or conversation has several rows: a column
                (its name, or its position in each row), one id for each row in the data set's order, or a function
                from a row to its id. Units are then drawn, with all of their rows; a unit's gradients become one before
                it is clipped. The loader's batch size, N and q count units; each physical batch holds whole units.
            max_rows_per_unit: where a unit has more rows, that many of them, drawn anew each time, take part.
            unit_reduction: whether a unit's gradient is the "mean" or the "sum" over its rows.
            augmentations: read each row that is drawn this many times (the data set's own random transform makes other
                views of it); all of them are one unit's, so they cost nothing more.
            grad_scaler: the GradScaler that the loop scales its loss with (fp16): its factor is undone before clipping,
                and held constant (see `dpkit.scaler`).
            noise: noise that is correlated from step to step: `BandedNoise` (with Poisson sampling by groups that take
                turns, or with fixed batches) or `BufferedNoise` (with fixed batches). None: independent noise.

        Raises:
            ConfigurationError: an argument out of range, or a combination that says nothing.
            SamplingError: the loader's batches cannot be accounted.
            UnsupportedModuleError: a module mixes records or updates weights in the forward.
        """
        if self._step is not None:
            raise ConfigurationError(
                "this engine is attached already",
                why="one engine keeps one model's step together.",
                cure="call engine.detach() first, or make another engine.",
            )
        if not isinstance(module, nn.Module) or not isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                f"module is a {type(module).__name__}, optimizer a {type(optimizer).__name__}",
                cure="pass an nn.Module and a torch.optim.Optimizer.",
            )
        inner = innermost(optimizer)
        if isinstance(inner, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ConfigurationError(
                f"the optimizer is {type(inner).__name__}",
                why="LBFGS evaluates the loss several times a step, SparseAdam skips rows without gradient: both would "
                "use the data beyond the one noisy gradient that is accounted.",
                cure="use any first-order optimizer (SGD, Adam, AdamW, ...).",
            )
        checks.refuse_wrapped(module)
        checks.choice("loss_reduction", loss_reduction, ("mean", "sum"))
        max_grad_norm = checks.number("max_grad_norm", max_grad_norm, low=0.0)
        size = checks.physical_batch_size(max_physical_batch_size, memory_budget)
        checks.flag("poisson_sampling", poisson_sampling)
        checks.flag("batch_first", batch_first)
        rule = clipping_of(clipping)
        refuse_private(data_loader)
        ranks = Ranks()
        units = units_of(
            checked(data_loader, ranks).dataset,
            privacy_unit,
            max_rows_per_unit=max_rows_per_unit,
            unit_reduction=unit_reduction,
            augmentations=augmentations,
            max_physical_batch_size=size,
        )
        sampling = sampling_of(data_loader, units, ranks, poisson=poisson_sampling)
        if not units.records or units.copies > 1:
            refuse_reordering(data_loader.dataset, data_loader.collate_fn)
        source = source_of(self._secure, noise_generator, data_loader.generator)
        if noise is not None:
            sampling = paced(sampling, noise, ranks.share(data_loader.generator or unforeseeable()))
            source = Correlated(noise, source)
            self._cyclic = self._cyclic or isinstance(sampling, CyclicPoisson)
        register_optional(module)
        checks.validate_model(module)
        sigma = noise_multiplier_for(
            self.accountant, sampling, noise_multiplier, target_epsilon, target_delta, epochs, steps
        )
        budget = budget_for(self.accountant, sampling, sigma, max_epsilon, target_delta)

        keep_freed()
        checks.choice("method", method, MODES)
        repeats = method == "auto" and (noise_generator is not None or self._spending.ledger is not None)
        self._step = PrivateStep(
            module,
            inner,
            sampling,
            rule,
            source,
            self._spending,
            ranks,
            noise_multiplier=sigma,
            max_grad_norm=max_grad_norm,
            loss_reduction=loss_reduction,
            batch_first=batch_first,
            method="model" if repeats else method,
            loss_scale=None if grad_scaler is None else LossScale(grad_scaler),
        )
        limit: Limit = size
        if max_physical_batch_size == "auto":
            first = next(module.parameters(), torch.zeros(0))
            room = free_bytes(first.device) // 2 if memory_budget is None else memory_budget
            limit = partial(self._step.tape.methods.most_records, room)
        self._loader = PrivateDataLoader(data_loader, sampling, units, self._step, limit, ranks)
        self._target_delta, self._spending.budget = target_delta, budget
        if target_epsilon is not None and target_delta is not None:
            self._spending.target = float(target_epsilon), float(target_delta)
        if _trained.get(module, self._spending.run) != self._spending.run:
            log.warning(
                "the model was trained by another engine before: what that has spent is not in this one's epsilon. "
                "make_private of the same engine, after detach(), adds up."
            )
        self._lives.begin(self._step, self._loader)
        self._spending.about = {"sampling": sampling.name, "target_delta": target_delta}
        try:
            refuse_own_sizes(self._step.shards, callable(limit))
            if ranks.size > 1:
                begin_together(ranks, module, data_loader.dataset, self._spending, self._configuration())
        except BaseException:
            self.detach()
            raise
        return module, optimizer, self._loader

    def make_private_with_epsilon(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, DataLoader[Any]]:
        """`make_private` under the name that Opacus gives the call with ``target_epsilon``."""
        return self.make_private(*args, **kwargs)

    def detach(self) -> None:
        """Give everything back as it was. What was spent stays in the accountant."""
        if self._step is None:
            return
        self._before += self._step.nonfinite_records
        if self._spending.released:
            _trained[self._step.model] = self._spending.run
        self._lives.end()
        self._step.detach()
        self._loader.close()
        self._step = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Public passes: forwards, backwards and steps inside are not clipped, noised or accounted."""
        tape = self._attached().tape
        before, tape.paused = tape.paused, True
        try:
            yield
        finally:
            tape.paused = before

    # ---------------------------------------------------------------- what the user may ask and set

    @property
    def noise_multiplier(self) -> float:
        """σ. May be set between steps (a schedule): clipping, noise and ledger follow from the next batch on."""
        return self._attached().noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._attached().noise_multiplier = checks.number("noise_multiplier", value, low=0.0, strict=False)

    @property
    def max_grad_norm(self) -> float:
        """C. May be set between steps: clipping and noise follow from the next batch on."""
        return self._attached().max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._attached().max_grad_norm = checks.number("max_grad_norm", value, low=0.0)

    @property
    def noise(self) -> Source:
        """Where the noise comes from: whether it is ``secure``, whether it is ``seeded`` by hand."""
        return self._attached().noise

    @property
    def sample_rate(self) -> float:
        """q, the probability with which a unit (record) takes part in a step."""
        return self._attached().sampling.sample_rate

    @property
    def expected_batch_size(self) -> float:
        """The divisor of the noisy sum: q · N."""
        return self._attached().sampling.expected_batch_size

    def get_epsilon(self, delta: float | None = None, *, group_size: int = 1) -> float:
        """ε at ``delta`` (by default target_delta) of everything released so far; 0.0 before the first step.

        With ``group_size`` k, for neighbouring data sets that differ by k units (records): group privacy.
        """
        delta = self._target_delta if delta is None else delta
        if delta is None:
            raise ConfigurationError(
                "get_epsilon() without delta", why="ε is a function of δ.", cure="pass delta=1e-5, say."
            )
        delta = checks.number("delta", delta, low=0.0, high=1.0)
        group_size = checks.count("group_size", group_size)
        if group_size != 1 and self._cyclic:
            raise ConfigurationError(
                f"group_size = {group_size!r} after steps whose records took turns",
                why="the records of a group take part in different steps, in which correlated noise makes their "
                "contributions overlap; what they cost together is not known.",
                cure="use independent noise, or make the group the unit of privacy (privacy_unit=...).",
            )
        return self._spending.epsilon(delta, group_size)

    def statement(self, delta: float | None = None) -> Statement:
        """The whole guarantee at ``delta`` (by default target_delta), of everything released so far: printed, a text;
        also Markdown, JSON and a model card.

        Raises:
            ConfigurationError: no delta, or the engine trained with several units of privacy.
            NotAttachedError: the engine has never been attached to a model.
        """
        lives, spending = self._lives.all(), self._spending
        if not lives:
            self._attached()
        epsilon = self.get_epsilon(delta)
        at = self._target_delta if delta is None else delta
        assert at is not None
        counts = spending.released, spending.composed
        return stated(lives, self.accountant, *counts, epsilon, float(at), spending.together(float(at)))

    @property
    def budget_spent(self) -> bool:
        """Whether another step would exceed ``max_epsilon``: the private loader then serves nothing more."""
        return not self._attached().admits()

    @property
    def releases(self) -> int:
        """How many steps the run has released, those that it made before a checkpoint was loaded included."""
        return self._spending.released

    @property
    def completed_passes(self) -> int:
        """How many passes over the data came to their end: ``for epoch in range(engine.completed_passes, epochs)``."""
        self._attached()
        return self._loader.completed

    @property
    def ledger(self) -> Ledger | None:
        """The ledger's file, if the engine was given one."""
        return self._spending.ledger

    def profile(self) -> Profile:
        """What was done for each trainable parameter in the last batch: method, time, memory. Printed, a table."""
        return self._attached().tape.methods.profile()

    @property
    def norm_histogram(self) -> NormHistogram:
        """How large gradients are beside C, from the noisy counts that ``clipping="histogram"`` releases with each sum.
        They are covered by ε: `dpkit.plots.gradient_norms` draws them."""
        histogram = self._attached().histogram
        if histogram is None:
            raise ConfigurationError(
                "this engine's clipping releases no histogram of norms",
                why="norms are those of private gradients.",
                cure='pass make_private(clipping="histogram"); or look at them without privacy (engine.norms_of).',
            )
        return histogram

    @torch.enable_grad()
    def norms_of(
        self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, records: int | None = None
    ) -> Tensor:
        """The gradient norm of each row of a batch, float64 [n], before clipping. NON-PRIVATE.

        Guarantee: none. Neither publish them nor choose C by them; ``clipping="histogram"`` tells of norms under ε.
        Nothing is released or counted, and the run goes on as if nothing had been asked, but for what a forward does to
        the global random generators (dropout) and the model's buffers.

        Args:
            loss_fn: from the model and the batch to one loss a row, [n] or [n, 1].
            batch: whatever ``loss_fn`` takes.
            records: n; by default the length of the batch's first tensor.

        Raises:
            ConfigurationError: n is not known, losses of another shape, or a sharded model.
            UnfinishedStepError: a batch of the private loader is in hand.
        """
        step = self._attached()
        n = checks.length_of(batch) if records is None else checks.count("records", records)
        return step.norms_of(lambda: loss_fn(step.model, batch), n)

    def backward(self, losses: Tensor) -> None:
        """The strict door: one loss a record, [n] or [n, 1]; checks that they are what they say.

        Raises:
            ConfigurationError: another shape.
            CoupledRecordsError: (first batch) a record's loss has a gradient at another record's activations.
            DoubleUseError: not as many losses as records were drawn.
        """
        self._attached().backward(losses)

    # ---------------------------------------------------------------- state

    def state_dict(self, *, weights: bool = True) -> dict[str, Any]:
        """Everything that the run needs to go on bit for bit, as plain values; `save_checkpoint` writes it to a file.

        Model, optimizer, σ and C, the place in the pass and in the logical batch, its sums so far, the generators of
        draws and noise, the global ones (torch, Python, numpy), what was released, and a learning clipping's state.
        Model and optimizer tensors are the live ones, as torch's own ``state_dict`` gives them. Where they are sharded
        (`fully_shard`), they are copies of the whole on the CPU, and all ranks have to call.

        It is as confidential as the data: it holds sums without noise, and the streams that noise comes from.

        Args:
            weights: if False, model and optimizer are left to somebody else's checkpoint (Trainer, Lightning,
                Accelerate, torch.distributed.checkpoint), which has to be loaded first: `load_state_dict` compares them
                with a fingerprint.
        """
        step = self._attached()
        if step.shards is not None:
            step.ranks.agree("the engine's state", releases=self._spending.released)
            step.ranks.done()
            step.shards.dealt_out()
        about = {"lives": [life.to_dict() for life in self._lives.all()], "target_delta": self._target_delta}
        parts = collect(self._parts(weights=weights))
        return {"version": 1, "configuration": self._configuration(), "about": about, **parts}

    def load_state_dict(self, state: dict[str, Any], *, replay: bool = True) -> None:
        """Go on from what `state_dict` gave, after `make_private` with the same arguments; see `load_checkpoint`."""
        self._load(copy.deepcopy(state), {}, replay)

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        *,
        also: Mapping[str, Stateful] | None = None,
        extra: Any = None,
        weights: bool = True,
    ) -> None:
        """Write `state_dict` to a file that is there whole or not at all, whatever happens meanwhile.

        Call it anywhere between the steps, best right after ``optimizer.step()``. A batch that has not had its step
        will be served again.

        The file is for resuming, and as confidential as the data. Publish ``model.state_dict()`` instead.

        Among several processes rank 0 writes it, and all have to call. A logical batch that was begun will be begun
        again. Any number of processes can go on from it, with `fully_shard` or without. Where it was sharded, every
        rank has noise of its own: another number of ranks goes on with fresh noise, and if the ledger holds releases
        beyond the checkpoint, with ``replay=False`` only.

        Args:
            also: what else belongs to the run and has ``state_dict`` and ``load_state_dict``: schedulers, averages.
            extra: any plain values of your own; `load_checkpoint` returns them.
            weights: if False, model and optimizer are left to somebody else's checkpoint; see `state_dict`.

        Raises:
            CheckpointError: it cannot be written, or something holds other than plain values. The file that was there
                before is untouched.
        """
        step = self._attached()
        if not step.ranks.first and step.shards is None:
            return
        state = self.state_dict(weights=weights)
        if not step.ranks.first:
            return
        checkpoint.save(path, {"state": state, "also": collect(also or {}), "extra": extra})

    def load_checkpoint(
        self, path: str | os.PathLike[str], *, also: Mapping[str, Stateful] | None = None, replay: bool = True
    ) -> Any:
        """Go on from a checkpoint; returns the ``extra`` that was saved with it. Call it after `make_private`.

        The next ``for batch in loader`` is the rest of the pass that was interrupted. Releases that the ledger holds
        beyond the checkpoint stay counted; they are repeated, bit for bit, and each is compared with what was released.
        Without a ledger, nobody can tell what was released after the checkpoint: it has to be the run's latest state.

        Args:
            also: the objects that were saved with it.
            replay: if False, go on with fresh draws and fresh noise: for machines that do not repeat bit for bit, or
                after a change of the code. What was released beyond the checkpoint then counts beside what follows.

        Raises:
            CheckpointError: damaged, or of another model, optimizer, data set or setting; nothing was loaded.
            LedgerError: the ledger is not the run's, or holds less than the checkpoint.
        """
        ranks = self._attached().ranks
        ranks.agree("load_checkpoint")  # so that rank 0 has written it
        held = checkpoint.load(path)
        ranks.agree("the checkpoint", **{k: held["state"].get("spending", {}).get(k) for k in ("run", "released")})
        ranks.done()
        refuse_others({"also": sorted(also or {})}, {"also": sorted(held["also"])})
        self._load({**held["state"], "also": held["also"]}, also or {}, replay)
        return held["extra"]

    def _load(self, state: dict[str, Any], also: Mapping[str, Stateful], replay: bool) -> None:
        if not isinstance(state, dict) or not {"version", "configuration", "about"} <= set(state):
            raise CheckpointError(
                "what was given is no engine's state",
                why="there is nothing to go on from.",
                cure="pass what state_dict() returned.",
            )
        refuse_others({"version": 1, **self._configuration()}, {"version": state["version"], **state["configuration"]})
        own = self._parts(replay, weights="weights" not in state)
        parts = {"also": Part(lambda: collect(also), lambda held: give_back(also, held)), **own}
        told = ("version", "configuration", "about")
        saved = {"also": {}, **{k: v for k, v in state.items() if k not in told}}
        lives = [*self._lives.told(), *lives_in(state)]
        give_back(parts, saved)
        self._lives.go_on(lives)
        if not replay:
            self._attached().forget()
            self._loader.reseed()

    def _parts(self, replay: bool = True, *, weights: bool = True) -> dict[str, Stateful]:
        """All that has a state, in the order in which it is loaded; what was spent comes last, it is not undone."""
        spending, step = self._spending, self._attached()

        def load(state: dict[str, Any]) -> None:
            def told() -> dict[str, Any]:
                spending.load_state_dict(state, replay=replay, repeatable=step.repeatable)
                return spending.state_dict()

            known = step.ranks.decide(told)
            if not step.ranks.first:
                spending.mirror(known)

        return {
            **step.parts(self._loader.inside, weights=weights),
            "loader": self._loader,
            "spending": Part(spending.state_dict, load),
        }

    def _configuration(self) -> dict[str, Any]:
        return {**self._attached().configuration(), **self._loader.configuration()}

    def _attached(self) -> PrivateStep:
        if self._step is None:
            raise NotAttachedError("the engine is not attached to a model", cure="call make_private first.")
        return self._step
