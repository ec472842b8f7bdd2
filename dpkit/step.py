"""The private step of one model: from the drawn batch to the noisy gradient, and what there is to save in between.

The loader hands batches out and takes them back (`dpkit.loader.Listener`), the optimizer calls before it steps; here
they meet. σ and C have their one home here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dpkit.accountants import Event, Gaussian

from . import checks
from .clipping import Clipping, HistogramClipping, NormHistogram, learns, noises_of
from .correlated import Correlated
from .errors import CheckpointError, ConfigurationError, DoubleUseError, UncoveredParameterError, UnfinishedStepError
from .fingerprint import Fingerprint
from .joined import joined
from .loader import Draw
from .noise import Source
from .optimizers import Evaluated, called_by_step, settings
from .optional import register_optional
from .paced import Paced
from .proof import prove, refuse_coupled_losses
from .ranks import Ranks
from .sampling import Sampling
from .scaler import LossScale, placeholders
from .sharded import shards_of, whole
from .spending import Spending
from .state import Part, Stateful
from .sums import ClippedSum
from .tape import Tape
from .trees import leaves


class PrivateStep:
    """What happens to one model between two optimizer steps.

    Guarantee: what reaches ``p.grad`` is the clipped sum over the drawn records with the noise that is due, counted by
    ``spending`` before anybody can see it.

    Attributes:
        noise_multiplier, max_grad_norm: σ and C of the next logical batch.
        nonfinite_records: records left out because their gradient was not finite.
        histogram: the noisy counts of norms so far, where the clipping releases some.
        strictly_examined: whether losses were given one by one, and seen to be each of its own record.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sampling: Sampling,
        clipping: Clipping,
        noise: Source,
        spending: Spending,
        ranks: Ranks,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        loss_reduction: str,
        batch_first: bool,
        method: str,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.model, self.optimizer, self.sampling = model, optimizer, sampling
        self.clipping, self.noise, self.spending, self.ranks = clipping, noise, spending, ranks
        self._paced = sampling if isinstance(sampling, Paced) else None
        self.noise_multiplier, self.max_grad_norm = noise_multiplier, max_grad_norm
        self.loss_reduction = loss_reduction
        self._loss_scale, self._factor = loss_scale, 1.0
        if learns(clipping) and isinstance(noise, Correlated):
            raise ConfigurationError(
                "adaptive clipping with correlated noise",
                why="what sum and count cost together is known for independent noise only.",
                cure="use another clipping, or noise=None.",
            )
        noises_of(clipping, noise_multiplier, sampling.expected_batch_size)  # raises where they cannot amount to sigma
        self.nonfinite_records = 0
        self.histogram = clipping.nothing() if isinstance(clipping, HistogramClipping) else None
        self._given = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm}
        self._draw: Draw | None = None
        self._sum: ClippedSum | None = None
        self._charged: float | None = None  # fixed batches: the least σ charged for in this pass
        self._left_out = 0  # of the logical batch, by this rank
        self._fingerprint, self._compared = Fingerprint(), -1
        self._admitted: tuple[Any, bool] | None = None
        self.strictly_examined = False
        self._process = os.getpid()
        self.repeatable = not noise.secure  # whether the streams of noise are those of the checkpoint that was loaded
        self.shards = shards_of(model, ranks)
        if self.shards is not None:
            self._refuse_sharded()
        self.tape = Tape(model, batch_first=batch_first, method=method, shards=self.shards)
        try:
            self._trainable()
        except Exception:
            self.tape.detach()
            raise
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Give model and optimizer back as they were."""
        self.drop()
        self.tape.detach()
        self._hook.remove()
        if self._loss_scale is not None:
            self._loss_scale.release()

    def event(self, noise_multiplier: float | None = None) -> Event | None:
        """What a release (with this σ) costs now; None where the pass has paid for it."""
        sigma = self.noise_multiplier if noise_multiplier is None else noise_multiplier
        return self.sampling.event(Gaussian(sigma), first=self._charged is None or sigma < self._charged)

    # ---- the loader's side

    def begin_pass(self) -> None:
        """A new pass over the data: what an abandoned one left unfinished is dropped; it was never released."""
        self.drop()
        self._charged = None
        if self._process != os.getpid():  # a copy of the process that made this: its noise may not be the other's
            if self.noise.seeded:
                raise ConfigurationError(
                    "this process was forked from the one that called make_private with a noise_generator",
                    why="both would add the same noise to different sums, and the difference of what they release has "
                    "none.",
                    cure="call make_private in the process that trains, or leave noise_generator out.",
                )
            self._process = os.getpid()
            self.noise.reseed()
            if self._paced is not None:
                self._paced.restart()
        self.ranks.refuse_change()
        self.ranks.agree("a pass over the data", releases=self.spending.released)
        self.ranks.done()
        if self._paced is not None and self._paced.begin_pass() and isinstance(self.noise, Correlated):
            self.noise.restart()

    def admits(self) -> bool:
        """Whether the budget allows for the next logical batch; the rest of one that was begun always is."""
        if self._sum is not None or self.spending.budget is None:
            return True
        if self.ranks.size == 1:
            return self.spending.admits(self.event())
        asked = (self.spending.released, self.noise_multiplier, self._charged)
        if self._admitted is None or self._admitted[0] != asked:  # all ranks ask, once; rank 0 knows the ledger
            self.ranks.agree("the budget", releases=asked[0], noise_multiplier=asked[1])
            self._admitted = asked, self.ranks.decide(lambda: self.spending.admits(self.event()))
            self.ranks.done()
        return self._admitted[1]

    def hand_out(self, draw: Draw, batch: Any) -> None:
        """A physical batch goes to the user."""
        known = self.tape.parameters()
        if any(p not in known for p in self._parameters()):
            self._look_anew()
        if self._sum is None:
            self._sum = self._begin_sum()
        for p in self._parameters():
            p.grad = None
        self._draw = draw
        if self._loss_scale is None:
            self.tape.open(draw.n, owners=draw.units.owners())
        else:
            self._factor = self._loss_scale.current()
            self.tape.open(draw.n, placeholders(list(self._trainable())), draw.units.owners())
        if draw.n > 1 and self.shards is None:
            self.tape.remember(batch, sampled=self.sampling.sample_rate < 1.0)
        if draw.last and draw.n and self.noise_multiplier > 0 and self.ranks.first and self.shards is None:
            self.noise.prepare([p for p in self._parameters() if p.requires_grad])

    def _look_anew(self) -> None:
        """The optimizer has got parameters that were not there before: of new modules (adapters), or of no module."""
        register_optional(self.model)
        checks.validate_model(self.model)
        self.tape.renew()
        self._trainable()

    def _begin_sum(self) -> ClippedSum:
        if isinstance(self.noise, Correlated) and self.noise_multiplier != self._given["noise_multiplier"]:
            raise ConfigurationError(
                f"noise_multiplier was changed to {self.noise_multiplier:g} under correlated noise",
                why="a step's noise takes back that of the steps before; what a changing one costs is not known.",
                cure="keep it as it was given, or use independent noise (noise=None).",
            )
        batch = self.sampling.expected_batch_size
        return ClippedSum(self.clipping, self.noise_multiplier, self.max_grad_norm, batch, self.shards)

    def take_back(self, draw: Draw) -> None:
        """The user asks for the next batch."""
        if self._draw is not draw:
            return  # its step has been taken
        if draw.last and self.tape.batch is not None and self.tape.batch.forms:
            self.drop()
            raise UnfinishedStepError(
                "the next batch was asked for, and the last one was back-propagated without optimizer.step()",
                why="a record could enter one step through several draws, each clipped by itself.",
                cure="call optimizer.step() after every batch. To gather gradients over several physical batches give "
                "make_private(max_physical_batch_size=...): the step is then taken on the last of them only.",
            )
        self._close(draw, self._trainable())
        if draw.last:
            self.drop()
            if self._paced is not None:
                raise UnfinishedStepError(
                    "a batch was drawn and no step was taken on it, under correlated noise",
                    why="how far apart two participations of a record are is counted in steps.",
                    cure="call optimizer.step() on every batch, or leave the pass (break) and begin another.",
                )

    def empty_draw(self, draw: Draw) -> None:
        """Nobody was drawn: the noisy step is taken, and accounted, all the same."""
        self.optimizer.step()

    def drop(self) -> None:
        """Forget an unfinished logical batch; nothing of it was released."""
        self.tape.close()
        if self._draw is not None:
            for p in self._parameters():
                p.grad = None
        self._draw, self._sum, self._left_out = None, None, 0

    # ---- the user's side

    def backward(self, losses: Tensor) -> None:
        """The strict door; see `dpkit.PrivacyEngine.backward`."""
        if not isinstance(losses, Tensor):
            raise ConfigurationError(
                f"losses is a {type(losses).__name__}",
                why="there is nothing to back-propagate.",
                cure="pass one loss a record, computed from the model's outputs.",
            )
        if self.tape.paused:
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
        batch = self.tape.batch
        if batch is None or losses.shape[0] != batch.n:
            raise DoubleUseError(
                f"{losses.shape[0]} losses for {batch.n if batch else 0} drawn records",
                why="each record that was drawn enters the step once.",
                cure="compute the losses of the batch that the private loader has just yielded.",
            )
        if not self.strictly_examined and batch.n > 1 and self.shards is None:  # sharded: ranks would part
            self.strictly_examined = refuse_coupled_losses(self.tape, batch, losses)
        (losses.mean() if self.loss_reduction == "mean" else losses.sum()).backward()

    def norms_of(self, losses_of: Callable[[], Tensor], n: int) -> Tensor:
        """The gradients' norms [n] of the losses of n records, exact and not private; see `dpkit.PrivacyEngine`."""
        if self._draw is not None:
            raise UnfinishedStepError(
                "norms were asked for while a batch of the private loader is in hand",
                why="its records and the others would meet in one step.",
                cure="ask right after optimizer.step(), or outside the loop.",
            )
        if self.shards is not None:
            raise ConfigurationError(
                "norms were asked for of a model that is sharded over the ranks",
                why="each rank holds a part of every gradient.",
                cure="ask before fully_shard, in one process.",
            )
        grads = {p: p.grad for p in self._parameters()}
        before, self.tape.paused = self.tape.paused, False
        try:
            for p in grads:
                p.grad = None
            self.tape.open(n)
            losses = losses_of()
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            if shape not in ([n], [n, 1]):
                raise ConfigurationError(
                    f"losses has shape {shape}, for {n} records",
                    why="a norm is that of one record's gradient.",
                    cure='compute one loss a record (reduction="none"), and bring them to shape [n].',
                )
            losses.sum().backward()
            batch = self.tape.close()
            assert batch is not None
            prove(self.tape, batch, self.max_grad_norm)
            squares = [joined(found).sq_norm().double() for p, found in batch.forms.items() if p.requires_grad]
            return torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(n, dtype=torch.float64)
        finally:
            self.tape.close()
            self.tape.paused = before
            for p, grad in grads.items():
                p.grad = grad

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self.tape.paused or (self._draw is None and called_by_step(optimizer)):
            return None
        given = [a for a in (*args[1:], *kwargs.values()) if a is not None]
        if not given:
            self._take_step()
            return None
        closure = given[0]
        if len(given) > 1 or not callable(closure):
            raise ConfigurationError(
                f"optimizer.step() was given {', '.join(type(a).__name__ for a in given)}",
                why="what it does with the gradient is not known.",
                cure="call optimizer.step(), with a closure or without.",
            )
        with torch.enable_grad():
            loss = closure()  # here, so that its gradient is clipped and noised
        self._take_step()
        known = Evaluated(loss)
        return (
            tuple(known if a is closure else a for a in args),
            {name: known if a is closure else a for name, a in kwargs.items()},
        )

    def _take_step(self) -> None:
        draw = self._draw
        if draw is None:
            if any(p.grad is not None for p in self._parameters()):
                raise DoubleUseError(
                    "optimizer.step() without a batch: the last one's step was taken, or none was drawn",
                    why="the gradients at hand are not those of a drawn, clipped and accounted batch.",
                    cure="loop over the loader that make_private returned, and call optimizer.step() once for each of "
                    "its batches; for public data use engine.paused(). Several networks that learn from the same batch "
                    "are one module (nn.ModuleList) with one optimizer.",
                )
            return
        try:
            trainable = self._trainable()
            self._close(draw, trainable)
            if draw.last:
                self._release(draw, trainable)
        except BaseException as error:
            self.drop()
            self.ranks.give_up(error)
            raise

    @torch.no_grad()
    def _close(self, draw: Draw, trainable: dict[nn.Parameter, int]) -> None:
        """End a physical batch: prove, clip, and add its weighted sums to those of the logical batch."""
        batch = self.tape.close()
        self._draw = None
        if batch is None:
            return
        draw.done = True
        batch.unmark()
        prove(self.tape, batch, self.max_grad_norm)
        forms = {p: joined(found) for p, found in batch.forms.items() if p.requires_grad}
        batch.forms.clear()  # here they are held alone, so that each can go as soon as it is summed up
        batch.tapped.clear()
        for p in forms:
            if p not in trainable:
                raise UncoveredParameterError(
                    f"{self.tape.name(p)} received a gradient, but the optimizer does not hold it",
                    why="it would take its share of the clipping norm and never be trained or accounted.",
                    cure="add it to the optimizer (optimizer.add_param_group) or freeze it.",
                )
        if forms and self._sum is not None and not draw.void:
            scale = (float(batch.n) if self.loss_reduction == "mean" else 1.0) / self._factor
            self._left_out += self._sum.add(forms, trainable, draw.units, scale)
        elif self._sum is not None:
            self._sum.add_nothing(trainable)

    @torch.no_grad()
    def _release(self, draw: Draw, trainable: dict[nn.Parameter, int]) -> None:
        """Sums + noise, divided by the expected batch size, become ``p.grad``; the ledger is written first."""
        if self._paced is not None and not self._paced.follows(draw.logical):
            raise UnfinishedStepError(
                "a batch before this one was drawn and not released (its step failed), under correlated noise",
                why="how far apart two participations of a record are is counted in releases: it would come too soon.",
                cure="leave the pass (break) and begin another.",
            )
        if self._process != os.getpid():
            raise UnfinishedStepError(
                "this process was forked from the one that began the pass over the data",
                why="both would draw the same records and add the same noise, and the difference of what they release "
                "has none.",
                cure="begin a pass of its own in each process: for batch in loader.",
            )
        clipped, self._sum = self._sum, None
        assert clipped is not None
        if self.ranks.size > 1:
            self._agree(draw, clipped, trainable)
        sums, observed = clipped.take(trainable), clipped.take_observed()
        event = self.event(clipped.noise_multiplier)
        beside = list(observed)
        if self.ranks.size > 1:
            beside.append(torch.tensor([self._left_out]))
            self.ranks.gather(beside if self.shards is not None else [*sums, *beside])
        grads: list[Tensor] = []

        def noisy() -> None:
            self.noise.add_to(sums, clipped.std)
            if sums:  # nothing trains: a release of nothing
                torch._foreach_div_(sums, self.sampling.expected_batch_size)
            grads.extend(self._as_gradients(trainable, sums))

        if self.shards is not None:  # every rank's own rows, with noise of their own
            noisy()
            mark = int(self._fingerprint.of([self.shards.local(g) for g in grads]), 16)
            marks = [torch.tensor(self.ranks.collect(mark - (1 << 63)))]

        def release() -> bool:
            """Noise, and the count of it; what nobody may see before. Returns whether it is another one than before."""
            if self.shards is None:
                noisy()
            self.noise.add_to(observed, clipped.observed_std)
            repeated = self.spending.repeating
            self.spending.record(event, [*(grads if self.shards is None else marks), *observed])
            return not repeated

        counted = self.ranks.decide(release)
        if not self.ranks.first:
            if self.shards is None:
                grads.extend(torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in trainable)
            self.spending.follow(event if counted else None)
        self.ranks.hand_out(beside if self.shards is not None else [*grads, *beside])
        self.ranks.done()
        self.nonfinite_records += int(beside[-1]) if self.ranks.size > 1 else self._left_out
        self._left_out = 0
        if event is not None:
            self._charged = clipped.noise_multiplier
        if self._paced is not None:
            self._paced.advance()
        if observed and self.max_grad_norm == clipped.max_grad_norm:  # else it was set by hand meanwhile
            self.max_grad_norm = clipped.learned(observed[0])
        if self.histogram is not None:
            self.histogram = self.histogram.plus(observed[0], clipped.observed_std, self.sampling.expected_batch_size)
        if self.shards is not None:
            self.shards.dealt_out()
        for p, grad in zip(trainable, grads, strict=True):
            p.grad = grad

    def _agree(self, draw: Draw, clipped: ClippedSum, trainable: dict[nn.Parameter, int]) -> None:
        """All ranks are at the same logical batch, with the same settings and, looked at now and then, weights."""
        number = self.spending.released
        due = self.shards is None and (self._compared < 0 or number - self._compared >= self.ranks.compared_every)
        if due:
            self._compared = number
        self.ranks.agree(
            "a release",
            releases=number,
            batch=draw.logical,
            records_drawn=draw.mark,
            noise_multiplier=clipped.noise_multiplier,
            max_grad_norm=clipped.max_grad_norm,
            trained=[p.requires_grad for p in self._parameters()],
            optimizer=[settings(group) for group in self.optimizer.param_groups],
            weights=self._fingerprint.of([p.detach() for p in self._parameters()]) if due else "",
        )

    def _as_gradients(self, parameters: dict[nn.Parameter, int], sums: list[Tensor]) -> Iterator[Tensor]:
        for p, total in zip(parameters, sums, strict=True):
            if self.shards is not None:
                yield self.shards.as_gradient(p, total)
            else:
                shaped = total.view(p.shape)
                yield shaped if shaped.dtype == p.dtype else shaped.to(p.dtype)

    def _refuse_sharded(self) -> None:
        """Raise for what is not known to be right, or not to part the ranks, where parameters are sharded."""
        for seen, there, cure in (
            ("noise_generator", self.noise.seeded, "leave it out: equal streams on two ranks are no fresh noise."),
            ("correlated noise", isinstance(self.noise, Correlated), "use independent noise (noise=None)."),
            ("a GradScaler", self._loss_scale is not None, "train in bfloat16 or float32."),
        ):
            if there:
                raise ConfigurationError(
                    f"{seen} with parameters that are sharded (fully_shard)",
                    why="each rank adds the noise of its own rows.",
                    cure=cure,
                )

    def _parameters(self) -> list[nn.Parameter]:
        """The optimizer's parameters."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _trainable(self) -> dict[nn.Parameter, int]:
        """The trainable parameters that the optimizer holds, in its order, with their position."""
        known = self.tape.parameters()
        found: dict[nn.Parameter, int] = {}
        for p in self._parameters():
            if p not in known:
                raise UncoveredParameterError(
                    f"the optimizer holds a parameter {list(p.shape)} that is not in the model",
                    why="its gradient would not be clipped per record.",
                    cure="make it part of the module given to make_private, or train it elsewhere on public data.",
                )
            if p.requires_grad:
                if p.is_complex():
                    raise ConfigurationError(
                        f"{known[p]} {list(p.shape)} is complex ({p.dtype})",
                        why="norms and noise are those of real numbers.",
                        cure="hold its real and imaginary parts in the last dimension of a real parameter, and take "
                        "torch.view_as_complex(parameter) in the forward; or freeze it.",
                    )
                found[p] = len(found)
        return found

    # ---- state

    def parts(self, inside: bool, *, weights: bool = True) -> dict[str, Stateful]:
        """All that has a state here; ``inside``: whether a pass is under way, so that its sums go on; ``weights``:
        model and optimizer, or else what they are compared with when somebody else has loaded them."""
        parts: dict[str, Stateful] = {
            **(self._whole() if weights else {"weights": Part(self._weights, self._refuse_other_weights)}),
            "noise": Part(self._streams, self._load_streams),
            "methods": self.tape.methods,
        }
        if isinstance(self.clipping, Stateful):
            parts["clipping"] = self.clipping
        if isinstance(self.sampling, Stateful):
            parts["sampling"] = self.sampling
        parts["step"] = Part(lambda: self._state(inside), self._load)
        return parts

    def _whole(self) -> dict[str, Stateful]:
        if self.shards is None:
            return {"model": self.model, "optimizer": self.optimizer}
        return {"model": self.shards.model(), "optimizer": self.shards.optimizer(self.optimizer)}

    def _streams(self) -> dict[str, Any]:
        """Where the noise comes from; with shards, of every rank."""
        own = self.noise.state_dict()
        return own if self.shards is None else {"of": self.ranks.each(own)}

    def _load_streams(self, state: dict[str, Any]) -> None:
        """Go on with the streams of noise; with fresh ones, if there were more or fewer ranks with one of their own."""
        held = state.get("of", [state])
        own = [self.ranks.rank, self.ranks.size] if self.shards is not None else [0, 1]
        if len(held) == own[1]:
            self.noise.load_state_dict(held[own[0]])
        else:
            self.noise.reseed()
        self.repeatable = len(held) == own[1] and not self.noise.secure

    def _weights(self) -> dict[str, Any]:
        """What tells the model's and the optimizer's tensors from others."""
        held = leaves((self.model.state_dict(), self.optimizer.state_dict()["state"]))
        return {"fingerprint": Fingerprint().of(whole(v) for v in held if isinstance(v, Tensor))}

    def _refuse_other_weights(self, state: dict[str, Any]) -> None:
        if state != self._weights():
            raise CheckpointError(
                "model and optimizer are not in the state in which the checkpoint was saved",
                why="it was saved without them; the run would go on from other weights than those it had.",
                cure="load them first, from what was saved at the same step.",
            )

    def configuration(self) -> dict[str, Any]:
        """What has to be the same where a saved state is loaded, in numbers and words."""
        model = self.model.state_dict()
        return {
            **self._given,
            "noise": repr(self.noise.correlation) if isinstance(self.noise, Correlated) else "independent",
            "clipping": repr(self.clipping) if is_dataclass(self.clipping) else type(self.clipping).__name__,
            "loss_reduction": self.loss_reduction,
            "optimizer": type(self.optimizer).__name__,
            "parameter groups": [len(group["params"]) for group in self.optimizer.param_groups],
            **{f"model's {k}": f"{v.dtype} {list(v.shape)}" for k, v in model.items() if isinstance(v, Tensor)},
        }

    def forget(self) -> None:
        """Go on with fresh noise and without what was begun; what a pass has paid for is paid anew."""
        self.drop()
        self._charged = None
        self.noise.reseed()
        if self._paced is not None:
            self._paced.restart()

    def _state(self, inside: bool) -> dict[str, Any]:
        names = self.tape.parameters()
        return {
            "noise_multiplier": self.noise_multiplier,
            "max_grad_norm": self.max_grad_norm,
            "charged": self._charged if inside else None,
            "nonfinite_records": self.nonfinite_records,
            "histogram": None if self.histogram is None else asdict(self.histogram),
            "trainable": [name for p, name in names.items() if p.requires_grad],
            "sum": self._sum.state_dict(names) if self._sum is not None and inside and self.ranks.size == 1 else None,
            "left_out": self._left_out if inside and self.ranks.size == 1 else 0,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.drop()
        self.noise_multiplier, self.max_grad_norm = state["noise_multiplier"], state["max_grad_norm"]
        self._charged, self.nonfinite_records = state["charged"], state["nonfinite_records"]
        self.histogram = None if state["histogram"] is None else NormHistogram(**state["histogram"])
        parameters = {name: p for p, name in self.tape.parameters().items()}
        for name, p in parameters.items():
            p.requires_grad_(name in state["trainable"])
        self._compared, self._admitted = -1, None
        if state["sum"] is not None and self.ranks.size == 1:  # among several ranks the batch is begun again
            self._left_out = state["left_out"]
            self._sum = self._begin_sum()
            self._sum.load_state_dict(state["sum"], parameters)
