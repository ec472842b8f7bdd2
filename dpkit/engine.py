"""The engine: ties sampling, tape, clipping, noise and ledger together. C, σ and q have their one home here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from dpkit.accountants import Accountant, Gaussian, GroupOf, PLDAccountant, make_accountant

from . import checks
from .clipping import Clipping, clipping_of
from .errors import (
    ConfigurationError,
    DoubleUseError,
    NotAttachedError,
    UncoveredParameterError,
    UnfinishedStepError,
)
from .forms import joined
from .loader import Draw, PrivateDataLoader, refuse_private
from .noise import NoiseSource
from .proof import prove, refuse_coupled_losses
from .rules import register_optional
from .sampling import checked, sampling_of
from .sums import ClippedSum
from .tape import Tape
from .targets import noise_multiplier_for
from .units import PrivacyUnit, refuse_reordering, units_of

M = TypeVar("M", bound=nn.Module)
O = TypeVar("O", bound=Optimizer)  # noqa: E741


class PrivacyEngine:
    """Makes an existing training loop differentially private.

    Guarantee: after any number of optimizer steps, the weights are (ε, δ)-differentially private with
    ε = ``get_epsilon(delta)``, for neighbouring data sets that differ by adding or removing one record (by zeroing one
    out, with ``poisson_sampling=False``; one unit, with ``privacy_unit``), as long as each record's loss depends on
    that record alone. The strict door, ``engine.backward(losses)``, checks that assumption; everything else is checked
    in any case or refused.

    Args:
        accountant: the judge of what was spent: "pld" (tight), "rdp" (quick, some 5 to 15% above), or a
            `dpkit.accountants.Accountant`.
        secure_mode: not available in this version.

    >>> engine = PrivacyEngine()                                                            # doctest: +SKIP
    >>> model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer,
    ...     data_loader=loader, noise_multiplier=1.1, max_grad_norm=1.0)
    """

    def __init__(self, accountant: str | Accountant = "pld", secure_mode: bool = False) -> None:
        if secure_mode:
            raise ConfigurationError(
                "secure_mode=True",
                why="noise from a cryptographic generator is not part of this version, and plain noise is not secure.",
                cure="use secure_mode=False (noise seeded from the operating system, by torch's generator).",
            )
        self.accountant = accountant if isinstance(accountant, Accountant) else make_accountant(accountant)
        self.nonfinite_records = 0
        """Records whose gradient was not finite and was replaced by zero. Not covered by ε: do not publish it."""
        self._tape: Tape | None = None
        self._draw: Draw | None = None
        self._sum: ClippedSum | None = None
        self._target_delta: float | None = None
        self._charged: float | None = None  # fixed batches: the least σ charged for in this pass

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
        clipping: str | Clipping = "flat",
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        max_physical_batch_size: int | None = None,
        noise_generator: torch.Generator | None = None,
        batch_first: bool = True,
        privacy_unit: PrivacyUnit | None = None,
        max_rows_per_unit: int | None = None,
        unit_reduction: str = "mean",
        augmentations: int = 1,
    ) -> tuple[M, O, DataLoader[Any]]:
        """Attach to a model, its optimizer and its data; returns the same model and optimizer, and a private loader.

        Args:
            module: the model. It stays as it is; hooks observe it while the loader's batches are in the user's hands.
                Attention, recurrent layers and bags need no conversion: they are taken apart inside the forward. What
                has to be another function (BatchNorm) is refused; `dpkit.layers.convert` replaces it.
            optimizer: any torch optimizer whose ``step`` needs no closure.
            data_loader: a DataLoader over a map-style dataset; its batch size B gives the sampling rate q = B / N.
            max_grad_norm: C, the bound on each record's gradient norm.
            noise_multiplier: σ, the noise's standard deviation divided by C; or leave it out and give
            target_epsilon, target_delta, and epochs or steps: the least σ that keeps within them is found.
            clipping: "flat", "automatic", "per_layer", or an object with ``weights`` and ``sensitivity``.
            loss_reduction: whether the loss that is back-propagated is the "mean" or the "sum" over the batch.
            poisson_sampling: draw each record independently (amplification is accounted); if False, the loader's own
                batches are kept and no amplification is claimed.
            max_physical_batch_size: serve a logical batch in parts of at most this many records. Call
                ``optimizer.step()`` after each part as usual; only the last one of a logical batch takes the step. A
                scheduler that is stepped beside it counts parts, not steps.
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

        Raises:
            ConfigurationError: an argument out of range, or a combination that says nothing.
            SamplingError: the loader's batches cannot be accounted.
            UnsupportedModuleError: a module mixes records or updates weights in the forward.
        """
        if self._tape is not None:
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
        if isinstance(optimizer, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise ConfigurationError(
                f"the optimizer is {type(optimizer).__name__}",
                why="LBFGS evaluates the loss several times a step, SparseAdam skips rows without gradient: both would "
                "use the data beyond the one noisy gradient that is accounted.",
                cure="use any first-order optimizer (SGD, Adam, AdamW, ...).",
            )
        checks.choice("loss_reduction", loss_reduction, ("mean", "sum"))
        max_grad_norm = checks.number("max_grad_norm", max_grad_norm, low=0.0)
        if max_physical_batch_size is not None:
            checks.count("max_physical_batch_size", max_physical_batch_size)
        rule = clipping_of(clipping)
        refuse_private(data_loader)
        units = units_of(
            checked(data_loader).dataset,
            privacy_unit,
            max_rows_per_unit=max_rows_per_unit,
            unit_reduction=unit_reduction,
            augmentations=augmentations,
            max_physical_batch_size=max_physical_batch_size,
        )
        sampling = sampling_of(data_loader, units, poisson=poisson_sampling)
        if not units.records or units.copies > 1:
            refuse_reordering(data_loader.dataset, data_loader.collate_fn)
        register_optional(module)
        checks.validate_model(module)
        sigma = noise_multiplier_for(
            self.accountant, sampling, noise_multiplier, target_epsilon, target_delta, epochs, steps
        )

        tape = Tape(module, batch_first=batch_first)
        self._tape, self._optimizer, self._sampling = tape, optimizer, sampling
        self._clipping, self._loss_reduction = rule, loss_reduction
        self._target_delta = target_delta
        self._noise_multiplier, self._max_grad_norm = sigma, max_grad_norm
        self._noise = NoiseSource(noise_generator)
        if noise_generator is not None:
            self._noise.refuse_shared(data_loader.generator)
        self._strictly_examined = False
        try:
            self._trainable()
        except Exception:
            tape.detach()
            self._tape = None
            raise
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        self._loader = PrivateDataLoader(data_loader, sampling, units, self, max_physical_batch_size)
        return module, optimizer, self._loader

    def make_private_with_epsilon(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, DataLoader[Any]]:
        """`make_private` under the name that Opacus gives the call with ``target_epsilon``."""
        return self.make_private(*args, **kwargs)

    def detach(self) -> None:
        """Give everything back as it was. What was spent stays in the accountant."""
        if self._tape is None:
            return
        self._tape.detach()
        self._step_hook.remove()
        self._loader.close()
        self._drop()
        self._tape = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Public passes: forwards, backwards and steps inside are not clipped, noised or accounted."""
        tape = self._attached()
        before, tape.paused = tape.paused, True
        try:
            yield
        finally:
            tape.paused = before

    # ---------------------------------------------------------------- what the user may ask and set

    @property
    def noise_multiplier(self) -> float:
        """σ. May be set between steps (a schedule): clipping, noise and ledger follow from the next batch on."""
        self._attached()
        return self._noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._attached()
        self._noise_multiplier = checks.number("noise_multiplier", value, low=0.0, strict=False)

    @property
    def max_grad_norm(self) -> float:
        """C. May be set between steps: clipping and noise follow from the next batch on."""
        self._attached()
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._attached()
        self._max_grad_norm = checks.number("max_grad_norm", value, low=0.0)

    @property
    def sample_rate(self) -> float:
        """q, the probability with which a unit (record) takes part in a step."""
        self._attached()
        return self._sampling.sample_rate

    @property
    def expected_batch_size(self) -> float:
        """The divisor of the noisy sum: q · N."""
        self._attached()
        return self._sampling.expected_batch_size

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
        if checks.count("group_size", group_size) == 1:
            return self.accountant.epsilon(delta)
        judge = PLDAccountant(adjacency=self.accountant.adjacency)  # the Rényi accountant knows no bound for groups
        for event, count in self.accountant.ledger:
            judge.compose(GroupOf(group_size, event), count)
        return judge.epsilon(delta)

    def backward(self, losses: Tensor) -> None:
        """The strict door: one loss a record, [n] or [n, 1]; checks that they are what they say.

        Raises:
            ConfigurationError: another shape.
            CoupledRecordsError: (first batch) a record's loss has a gradient at another record's activations.
            DoubleUseError: not as many losses as records were drawn.
        """
        tape = self._attached()
        if tape.paused:
            losses.mean().backward()
            return
        if losses.ndim == 2 and losses.shape[1] == 1:
            losses = losses.squeeze(1)
        if losses.ndim != 1:
            raise ConfigurationError(
                f"losses has shape {list(losses.shape)}",
                why="a loss that was reduced over records, or broadcast to a matrix, is not one loss a record.",
                cure='compute it with reduction="none" and bring it to shape [n].',
            )
        batch = tape.batch
        if batch is None or losses.shape[0] != batch.n:
            raise DoubleUseError(
                f"{losses.shape[0]} losses for {batch.n if batch else 0} drawn records",
                why="each record that was drawn enters the step once.",
                cure="compute the losses of the batch that the private loader has just yielded.",
            )
        if not self._strictly_examined and batch.n > 1:
            self._strictly_examined = refuse_coupled_losses(tape, batch, losses)
        (losses.mean() if self._loss_reduction == "mean" else losses.sum()).backward()

    # ---------------------------------------------------------------- the loader's side

    def begin_pass(self) -> None:
        """A new pass over the data: what an abandoned one left unfinished is dropped; it was never released."""
        self._attached()
        self._drop()
        self._charged = None

    def hand_out(self, draw: Draw) -> None:
        """A physical batch goes to the user."""
        tape = self._attached()
        if self._sum is None:
            self._sum = ClippedSum(self._clipping, self._noise_multiplier, self._max_grad_norm)
        for p in self._parameters():
            p.grad = None
        self._draw = draw
        tape.open(draw.n)

    def take_back(self, draw: Draw) -> None:
        """The user asks for the next batch."""
        if self._draw is not draw:
            return  # its step has been taken
        if draw.last and self._attached().batch is not None and self._attached().batch.forms:  # type: ignore[union-attr]
            self._drop()
            raise UnfinishedStepError(
                "the next batch was asked for, and the last one was back-propagated without optimizer.step()",
                why="a record could enter one step through several draws, each clipped by itself.",
                cure="call optimizer.step() after every batch. To gather gradients over several physical batches give "
                "make_private(max_physical_batch_size=...): the step is then taken on the last of them only.",
            )
        self._close(draw)
        if draw.last:
            self._drop()

    def empty_draw(self, draw: Draw) -> None:
        """Nobody was drawn: the noisy step is taken, and accounted, all the same."""
        self.hand_out(draw)
        self._optimizer.step()

    # ---------------------------------------------------------------- the step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        tape = self._attached()
        if tape.paused:
            return
        if any(a is not None for a in (*args[1:], *kwargs.values())):
            raise ConfigurationError(
                "optimizer.step() was given a closure",
                why="it would back-propagate after the gradient of this step has been clipped and noised.",
                cure="run forward and backward before optimizer.step().",
            )
        draw = self._draw
        if draw is None:
            if any(p.grad is not None for p in self._parameters()):
                raise DoubleUseError(
                    "optimizer.step() without a batch: the last one's step was taken, or none was drawn",
                    why="the gradients at hand are not those of a drawn, clipped and accounted batch.",
                    cure="call optimizer.step() once for each batch of the private loader; for public data use "
                    "engine.paused().",
                )
            return
        try:
            self._close(draw)
            if draw.last:
                self._release()
        except BaseException:
            self._drop()
            raise

    @torch.no_grad()
    def _close(self, draw: Draw) -> None:
        """End a physical batch: prove, clip, and add its weighted sums to those of the logical batch."""
        tape = self._attached()
        batch = tape.close()
        self._draw = None
        if batch is None:
            return
        draw.done = True
        trainable = self._trainable()
        prove(tape, batch)
        forms = {p: joined(found) for p, found in batch.forms.items() if p.requires_grad}
        for p in forms:
            if p not in trainable:
                raise UncoveredParameterError(
                    f"{tape.name(p)} received a gradient, but the optimizer does not hold it",
                    why="it would take its share of the clipping norm and never be trained or accounted.",
                    cure="add it to the optimizer (optimizer.add_param_group) or freeze it.",
                )
        if forms and self._sum is not None:
            scale = float(batch.n) if self._loss_reduction == "mean" else 1.0
            self.nonfinite_records += self._sum.add(forms, trainable, draw.units, scale)

    @torch.no_grad()
    def _release(self) -> None:
        """Sums + noise, divided by the expected batch size, become ``p.grad``; the ledger is written first."""
        clipped, self._sum = self._sum, None
        assert clipped is not None
        trainable = self._trainable()
        sums = clipped.take(trainable)
        self._noise.add_to(sums, clipped.std)
        first = self._charged is None or clipped.noise_multiplier < self._charged
        event = self._sampling.event(Gaussian(clipped.noise_multiplier), first=first)
        if event is not None:
            self.accountant.compose(event)
            self._charged = clipped.noise_multiplier
        for p, total in zip(trainable, sums, strict=True):
            p.grad = total.div_(self._sampling.expected_batch_size).view(p.shape).to(p.dtype)

    # ---------------------------------------------------------------- small things

    def _attached(self) -> Tape:
        if self._tape is None:
            raise NotAttachedError("the engine is not attached to a model", cure="call make_private first.")
        return self._tape

    def _drop(self) -> None:
        """Forget an unfinished logical batch; nothing of it was released."""
        if self._tape is not None:
            self._tape.close()
            if self._draw is not None:
                for p in self._parameters():
                    p.grad = None
        self._draw, self._sum = None, None

    def _parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters."""
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _trainable(self) -> dict[nn.Parameter, int]:
        """The trainable parameters that the optimizer holds, in its order, with their position."""
        tape = self._attached()
        known = tape.parameters()
        found: dict[nn.Parameter, int] = {}
        for p in self._parameters():
            if p not in known:
                raise UncoveredParameterError(
                    f"the optimizer holds a parameter {list(p.shape)} that is not in the model",
                    why="its gradient would not be clipped per record.",
                    cure="make it part of the module given to make_private, or train it elsewhere on public data.",
                )
            if p.requires_grad:
                found[p] = len(found)
        return found
