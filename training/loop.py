"""The training loop: steps, evaluations, checkpoints, interruptions.

Axis letters: B samples of a batch.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..mixers import collect_losses
from ..tasks import Batch, Task
from .checkpoint import load_state, load_weights, save_checkpoint, verify_checkpoint
from .config import RunConfig
from .cost import spread
from .data import TrainingData, evaluation_batches, seed_globally
from .optim import build_schedule
from .progress import Display
from .run_folder import append_line, keep_lines, write_json

_LOG_EVERY = 10  # steps between lines to the tracker
_WARMUP_STEPS = 3  # after a start, not part of the throughput: allocators, compilers and caches warm up
_SHOWN_SAMPLES = 64


class DivergedError(ConfigError):
    """The loss is not finite."""


class Interrupted(BaseException):
    """A signal asked the run to stop, and it is saved. Not an `Exception`: a sweep must stop, too."""

    def __init__(self, number: int, *, step: int, folder: Path) -> None:
        super().__init__(number)
        self.number, self.step, self.folder = number, step, folder


class Interrupts:
    """Within the block SIGINT and SIGTERM set `received` instead of ending the process; a second one ends it."""

    received: int | None = None

    def __enter__(self) -> Interrupts:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Trainer:
    """Trains a model on a task in a run's folder.

    Args:
        config: of the run.
        accelerator: Accelerate's.
        task: opened.
        model: fresh, on the CPU.
        optimizer: of the model's parameters.
        folder: of the run; exists when training starts.
        display: for people.
        facts: what checkpoints say of the run, see `checkpoint.read_facts`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        accelerator: Any,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: TrainingData,
        folder: Path,
        display: Display,
        facts: Mapping[str, Any],
    ) -> None:
        self.config, self.train, self.accelerator, self.task = config, config.train, accelerator, task
        self.folder, self.display, self.data, self.facts = folder, display, data, facts
        self.total = self.train.max_steps or self.train.epochs * data.steps_per_epoch
        self.eval_steps = self.train.eval_every * data.steps_per_epoch
        self.schedule = build_schedule(optimizer, self.train, self.total)
        self.ema = None
        if self.train.ema is not None:
            from timm.utils import ModelEmaV3

            model.to(accelerator.device)
            # the warm-up of the decay keeps a short run's average from remembering the first steps
            self.ema = ModelEmaV3(model, decay=self.train.ema, use_warmup=True)
        if self.train.compile:
            model.compile()
        self.raw = model
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.step = 0
        self.evaluated = 0  # the step of the last evaluation
        self.best: dict[str, Any] | None = None
        self.loss_sum, self.loss_count, self.seconds = 0.0, 0, 0.0
        self.aux: dict[str, float] = {}  # auxiliary losses of the last step, by name
        self.aux_sums: dict[str, float] = {}  # of auxiliary losses, by name, as `loss_sum`
        self.rates: list[float] = []
        self.interrupts = Interrupts()

    # -- state

    @property
    def evaluated_model(self) -> nn.Module:
        """The moving average where there is one, else the model."""
        return self.raw if self.ema is None else self.ema.module

    def save(self) -> None:
        """Write `checkpoints/last`: everything that a continued run needs."""
        if self.accelerator.is_main_process:
            models = {"model": self.raw} | ({} if self.ema is None else {"ema": self.ema.module})
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "evaluated": self.evaluated,
                "best": self.best,
                "loss_sum": self.loss_sum,
                "loss_count": self.loss_count,
                "aux_sums": self.aux_sums,
                "seconds": self.seconds,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save_checkpoint(self.folder / "checkpoints" / "last", models, state, self.facts)
        self.accelerator.wait_for_everyone()

    def restore(self, checkpoint: Path) -> None:
        """Continue from what `save` wrote. Randomness and data order follow from the step.

        Raises:
            ConfigError: a damaged checkpoint.
        """
        verify_checkpoint(checkpoint)
        state = load_state(checkpoint)
        load_weights(checkpoint / "model.safetensors", self.raw)
        if self.ema is not None:
            load_weights(checkpoint / "ema.safetensors", self.ema.module)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]
        self.loss_sum, self.loss_count, self.seconds = state["loss_sum"], state["loss_count"], state["seconds"]
        self.aux_sums = dict(state["aux_sums"])
        self.schedule.step_update(self.step)
        if self.accelerator.is_main_process:
            keep_lines(self.folder / "metrics.jsonl", self.evaluated)

    # -- training

    def fit(self) -> None:
        """Train to the end.

        Raises:
            DivergedError: the loss is not finite.
            Interrupted: a signal came; the state is saved.
        """
        with self.interrupts, self.display.running(self.step, self.total):
            if self._due() and self.evaluated != self.step:  # the run was cut off between a step and its evaluation
                self._evaluate_and_save()
            start = self.step
            steps = self.data.steps(self.step, self.total)
            while self.step < self.total:
                began = time.perf_counter()
                parts = next(steps)
                loss, stop = self._train_step(parts)
                taken = time.perf_counter() - began
                self.seconds += taken
                rate = sum(map(self.task.count, parts)) * self.accelerator.num_processes / taken
                if self.step - start > _WARMUP_STEPS or self.total <= _WARMUP_STEPS:
                    self.rates.append(rate)
                self.display.step(self.step, epoch=self._epoch(), loss=loss, rate=rate)
                if self.step % _LOG_EVERY == 0:
                    lr = self.optimizer.param_groups[0]["lr"]
                    aux = {f"train/{name}": value for name, value in self.aux.items()}
                    self.accelerator.log({"train/loss": loss, **aux, "lr": lr, "throughput": rate}, step=self.step)
                if stop:
                    self._interrupt()
                if self._due():
                    self._evaluate_and_save()

    def _epoch(self) -> int:
        return min(self.step // self.data.steps_per_epoch, math.ceil(self.total / self.data.steps_per_epoch))

    def _due(self) -> bool:
        return self.step > 0 and (self.step % self.eval_steps == 0 or self.step == self.total)

    def _train_step(self, parts: list[Batch]) -> tuple[float, bool]:
        """One optimizer step; returns its loss and whether a signal came, both over all processes.

        The loss, and so the gradient, is the mean over the targets of the whole step: a part with few of them counts
        little. What parts of the model add by `aux_loss` comes on top, with the weights of `train.aux_losses`.
        """
        self.model.train()
        # what dropout, stochastic depth and mixing draw in this step depends on nothing that came before it
        seed_globally(self.config.seed, "step", self.step, self.accelerator.process_index)
        counts = torch.stack([self.task.targets(batch).to(self.accelerator.device) for batch in parts])
        targets = self._over_processes(counts.sum()).clamp_min(1)
        # gradients of processes are averaged, not summed
        shares = counts * self.accelerator.num_processes / targets
        total = torch.zeros((), device=self.accelerator.device)
        aux: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(parts):
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with collect_losses() as added:
                    loss = self.task.loss(self.model, self.task.augment(batch))
                loss = loss * shares[i]
                for name, value in added.items():
                    loss = loss + (self.train.aux_losses or {}).get(name, 1.0) * shares[i] * value
                    aux[name] = aux.get(name, 0.0) + shares[i] * value.detach()
                total += loss.detach()
                self.accelerator.backward(loss)
        mean, stop = self._agree(total)
        if not math.isfinite(mean):
            self._diverged(mean, parts)
        if self.train.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.train.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.schedule.step_update(self.step)
        if self.ema is not None:
            self.ema.update(self.raw, step=self.step)
        for name in self.train.aux_losses or ():
            if name not in aux:
                added = ", ".join(sorted(aux)) or "none"
                raise ConfigError(f"train.aux_losses.{name}: the model has added no such loss. Added: {added}.")
        self.aux = {name: float(value) for name, value in aux.items()}
        for name, value in self.aux.items():
            self.aux_sums[name] = self.aux_sums.get(name, 0.0) + value * int(targets)
        self.loss_sum += mean * int(targets)
        self.loss_count += int(targets)
        return mean, stop

    def _over_processes(self, value: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value, reduction="sum")

    def _agree(self, loss: torch.Tensor) -> tuple[float, bool]:
        stop = self.interrupts.received is not None
        if self.accelerator.num_processes == 1:
            return float(loss), stop
        pair = torch.stack([loss, torch.full_like(loss, float(stop))])
        gathered = self.accelerator.gather(pair[None])
        return float(gathered[:, 0].mean()), bool(gathered[:, 1].any())

    def _mean_aux(self) -> dict[str, float]:
        """The auxiliary losses since the last evaluation, before their weights, over all processes."""
        names = sorted(self.aux_sums)
        sums = torch.tensor([self.aux_sums[name] for name in names], device=self.accelerator.device)
        means = self._over_processes(sums) / self.accelerator.num_processes / max(1, self.loss_count)
        return dict(zip(names, means.tolist(), strict=True))

    def _diverged(self, loss: float, parts: list[Batch]) -> None:
        samples = torch.cat([batch["index"] for batch in parts]).tolist()
        kept = self.folder / "checkpoints" / "last"
        if self.accelerator.is_main_process:
            write_json(self.folder / "diverged.json", {"step": self.step, "loss": loss, "samples": samples})
        shown = ", ".join(map(str, samples[:_SHOWN_SAMPLES]))
        more = f", ... ({len(samples)} in all, see diverged.json)" if len(samples) > _SHOWN_SAMPLES else ""
        good = f"The last good checkpoint is kept in {kept}" if kept.exists() else "There is no checkpoint yet"
        raise DivergedError(
            f"the training loss is {loss} at step {self.step}. Training samples of this batch: {shown}{more}. {good}. "
            "A lower optimizer.lr, train.clip_grad or a longer train.warmup may help."
        )

    def _interrupt(self) -> None:
        self.save()
        raise Interrupted(self.interrupts.received or signal.SIGINT, step=self.step, folder=self.folder)

    # -- evaluation

    def evaluate(self, split: str, model: nn.Module, *, interruptible: bool = False) -> dict[str, Any] | None:
        """Figures of a model on a split; None when a signal came and `interruptible`."""
        metrics = self.task.metrics()
        device = self.accelerator.device
        for metric in metrics.values():
            metric.to(device)
        model.eval()
        batches: Iterator[Batch] = evaluation_batches(
            self.task,
            split,
            batch_size=self.train.eval_batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            workers=self.train.workers,
            device=device,
        )
        with torch.no_grad(), self.accelerator.autocast():
            for batch in batches:
                self.task.update(metrics, model, batch)
                # all processes must reach the reduction below, so only a single one may leave early
                if interruptible and self.interrupts.received is not None and self.accelerator.num_processes == 1:
                    return None
        return self.task.compute(metrics)

    def _evaluate_and_save(self) -> None:
        figures = self.evaluate("val", self.evaluated_model, interruptible=True)
        if figures is None:
            self._interrupt()
            return
        value = figures[self.task.metric]
        line = {
            "step": self.step,
            "epoch": self.step / self.data.steps_per_epoch,
            "train_loss": self.loss_sum / max(1, self.loss_count),
            **({"aux": self._mean_aux()} if self.aux_sums else {}),
            "lr": self.optimizer.param_groups[0]["lr"],
            "val": {k: v for k, v in figures.items() if not isinstance(v, list)},
            "throughput": spread(self.rates[-self.eval_steps :])["median"],
            "seconds": self.seconds,
        }
        self.loss_sum, self.loss_count, self.aux_sums, self.evaluated = 0.0, 0, {}, self.step
        sign = 1 if self.task.higher_is_better else -1
        # of equals the later: it is the further trained one
        better = self.best is None or (math.isfinite(value) and not sign * value < sign * self.best["value"])
        if better:
            self.best = {"step": self.step, "value": value}
        if self.accelerator.is_main_process:
            if better:
                best = self.folder / "checkpoints" / "best"
                save_checkpoint(best, {"model": self.evaluated_model}, {}, self.facts)
            append_line(self.folder / "metrics.jsonl", line)
        self.accelerator.log({f"val/{k}": v for k, v in line["val"].items()}, step=self.step)
        self.display.evaluation(line)
        self.save()
        if self.interrupts.received is not None and self.accelerator.num_processes == 1 and self.step < self.total:
            raise Interrupted(self.interrupts.received, step=self.step, folder=self.folder)

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Evaluate the chosen weights once, on the test split or else on validation; returns (split, figures)."""
        model = self.evaluated_model
        if self.train.select == "best":
            load_weights(self.folder / "checkpoints" / "best" / "model.safetensors", model)
        split = "test" if "test" in self.task.splits() else "val"
        return split, self.evaluate(split, model) or {}
