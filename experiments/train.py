"""The training loop of one rank, top to bottom. It has no branch on strategy.

Every rank takes every branch that runs the model: a forward on rank 0 alone would wait for ever.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path

from experiments.assemble import (
    agree_on_folder,
    count_messages,
    is_validation_step,
    join_ranks,
    make_batches,
    make_trainer,
    set_step,
    share_of_batch,
    validation_share,
)
from experiments.config import TrainConfig
from experiments.console import Reporter
from experiments.environment import Rank
from experiments.explain import explain
from experiments.metering import Meters
from experiments.model_file import save_model
from experiments.process import not_ignored
from experiments.record import Record
from experiments.run_folder import Launched
from experiments.sample import sample_text
from experiments.saving import Saver, is_saved, listen
from experiments.tracing import write_trace
from experiments.tracking import Tracker, make_tracker
from experiments.verdict import mark_stopped, path_of
from minigpt.corpus import open_corpus
from minigpt.data import Batches
from minigpt.lora import merged
from minigpt.tokenizer import make_tokenizer
from parallel.drift import check_copies
from parallel.mesh import build_mesh, leave
from parallel.step import NonFinite, Trainer, UnderWay, evaluate
from parallel.weights import full_weights


def train(config: TrainConfig, launched: Launched, folder: Path | None, rank: Rank) -> int:
    """Train as one rank. Rank 0 writes the run's files into `folder`, which it makes if None.

    Returns the signal that stopped the run early, 0 if none did. Under a launcher that is SIGUSR1
    only: torchrun's own SIGTERM means that another rank is dead, and no step would end. Without
    one, signals that the caller ignores stay ignored.
    """
    numbers = [signal.SIGUSR1] if folder else not_ignored(signal.SIGUSR1, signal.SIGTERM)
    device = join_ranks(config, rank)
    folder = agree_on_folder(config, launched, folder)
    count_messages(folder)
    mesh = build_mesh(config.layout, device)
    corpus = open_corpus(Path(launched.corpus))
    batches = make_batches(config, corpus)
    trainer = make_trainer(config, mesh)
    received = listen(trainer, *numbers)
    saver = Saver(config, folder, trainer, corpus, launched.run)
    first = saver.begin()
    meters = Meters(config, trainer, first)

    record = Record(config, folder, mesh, corpus, launched.started)
    if saver.source:
        record.go_on(saver.source, first)
    reporter = Reporter(config.steps, mesh.rank == 0, first, path_of(folder, 0, "unprinted"))
    tracker = make_tracker(config.logging, folder, record.settings, reporter.say, mesh.rank)
    for line in (record.headline(), *saver.said):
        reporter.say(line)
    saver.say = reporter.say
    validation_loss = None
    with reporter, record:
        late: Taken | None = None  # the step before, where a GPU was not waited for
        for step in range(first, config.steps):
            taken = train_step(step, config, trainer, batches, meters)
            stop = late is not None and report(late, record, reporter, tracker)
            if is_compared(config, step):
                check_copies(trainer.replica)
            if is_validation_step(config, step):
                share = validation_share(batches, config, mesh)
                validation_loss = evaluate(trainer.replica, share)
                check_validation(validation_loss, step, trainer)
                record.add_validation(validation_loss)
            waits = stop or is_due(config, step) or not trainer.decides_on_device
            late = None if waits else taken
            if waits and saver.after(step, report(taken, record, reporter, tracker)):
                break
        saver.finish()

    if step + 1 < config.steps:
        reporter.say(f"stopped after {step + 1} steps; run.dir={folder} resume=auto goes on")
        if mesh.rank == 0:
            mark_stopped(folder, step + 1)
        tracker.finish(None)
        leave()
        stopped_by = received[0] if received else int(signal.SIGUSR1)
        received.clear()  # they are answered: this process may train again
        return stopped_by
    ledger = record.finish(meters, validation_loss)
    if config.trace:
        write_trace(meters, folder)
    weights = full_weights(trainer.replica) if config.run.save or config.sample.tokens else {}
    if config.finetune.on:
        weights = merged(weights, config.finetune)
    if ledger:  # rank 0
        tracker.finish(ledger)
        if config.run.save:
            about = {"model": record.settings["model"], "tokenizer": corpus.vocabulary}
            save_model(folder, weights, corpus, about)
        if config.sample.tokens:
            tokenizer = make_tokenizer(corpus.tokenizer, corpus.vocab_size, corpus.folder)
            reporter.say(sample_text(config, weights, tokenizer))
        reporter.finish(ledger, explain(config, ledger), folder)
    leave()
    return 0


@dataclass(frozen=True)
class Taken:
    """A step of the loop, with its learning rate and the host's seconds."""

    step: int
    under_way: UnderWay
    lr: float
    seconds: float


def train_step(
    step: int, config: TrainConfig, trainer: Trainer, batches: Batches, meters: Meters
) -> Taken:
    """One optimiser step, metered; on a GPU it may be under way."""
    with meters.step(step):
        lr = set_step(trainer, config, step)
        with meters.phase("data"):
            micro_batches = list(share_of_batch(batches, step, config, trainer.replica.mesh))
        under_way = trainer.launch(micro_batches)
    return Taken(step, under_way, lr, meters.last_step_s)


def report(taken: Taken, record: Record, reporter: Reporter, tracker: Tracker) -> bool:
    """Tell the user and the run's files what a step came to. Whether all ranks are to stop."""
    result = taken.under_way.result()
    record.add_step(taken.step, result, taken.lr, taken.seconds)
    reporter.step(taken.step, result.loss, record.tokens_per_s)
    tracker.log(taken.step, record.last)
    return result.stop


def check_validation(loss: float, step: int, trainer: Trainer) -> None:
    """Raise NonFinite where weights have left all bounds: no step's loss need have seen it."""
    if not math.isfinite(loss) and not trainer.may_skip:
        raise NonFinite(f"the validation loss after step {step + 1} is {loss}")


def is_compared(config: TrainConfig, step: int) -> bool:
    """Return whether copies are compared after this step: every so many, and after the last, whose
    weights are kept. `Saver.save` compares those of a checkpoint."""
    every, done = config.drift.every, step + 1
    due = every > 0 and (done % every == 0 or done == config.steps)
    return due and not is_saved(config, step)


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether something follows this step that must know what it came to."""
    return is_validation_step(config, step) or is_saved(config, step) or step + 1 == config.steps
