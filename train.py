"""Pre-train a Llama, stage by stage, and grow it in place between stages.

    python train.py config/quickstart.py                               one device
    torchrun --nproc_per_node 8 train.py config/1b.py --out out/1b     several; every field of the config can be overridden

Data, config and seed determine a run, however often it was stopped. It writes metrics.jsonl and ckpt.pt to `out`.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nanostack import checkpoint, differences, lock, parallel, preflight
from nanostack.config import Train, describe_tokens, load, presets
from nanostack.errors import UserError, exits_cleanly
from nanostack.flops import flops_per_token, n_params
from nanostack.generate import Writer
from nanostack.micro_step import MicroStep
from nanostack.optimizer import guarded_step
from nanostack.recorder import Recorder, header_of
from nanostack.run_folder import RunFolder
from nanostack.schedule import learning_rate
from nanostack.stop import StopFlag, Stopped
from nanostack.text.dataset import Prefetcher, Tokens
from nanostack.validation import Validation
from nanostack.watchdog import Watchdog


class Run:
    """A run: its parts, of which those with cheap checks come first; then its loop, top to bottom."""

    def __init__(self, requested: Train):
        self.watchdog = Watchdog(requested.hang_timeout, requested.out)
        with self.watchdog, self.watchdog.phase("start"):
            self.begin(requested)

    def begin(self, requested: Train) -> None:
        """Make the parts."""
        # Device: the process group, the mesh, what computes; and all that can be known to be wrong.
        how = (requested.parallel, requested.dtype, requested.compile, requested.cuda_graph, requested.hang_timeout)
        self.placement = parallel.start(*how, requested.out)
        checked = preflight.check(requested, self.placement)
        self.config, self.kernels, config = checked.config, checked.kernels, checked.config

        # Data: samples to train on, and a fixed part of the validation split.
        self.tokens = Tokens(config.data.path, "train", config.model.seq_len, config.seed)
        self.validation = Validation(Tokens(config.data.path, "val", config.model.seq_len), config.data.val_tokens)
        self.writer = Writer(config)

        # State: of the checkpoint that the run goes on from, or begins with; else from the seed.
        self.folder = RunFolder(requested, self.placement.launch)
        resume_from = parallel.on_rank_0(self.folder.claim)
        self.resuming, source = resume_from is not None, resume_from or config.init_from
        self.state = checkpoint.begin(config, source, self.resuming, checked.manifest_sha256, self.placement)
        self.state.model.end_of_text = self.tokens.manifest["tokenizer"]["eot"] if config.data.document_mask else None
        self.micro_step = MicroStep(checked.micro_steps, config.cuda_graph)

        # Folder: nothing in it was touched so far, and until now a signal ended the process at once.
        self.stop = StopFlag()
        if self.resuming:
            parallel.on_rank_0(differences.check, requested, self.state.cursor)
        parallel.on_rank_0(self.folder.make_ready, self.state.cursor.samples)
        ckpt, in_shards = Path(config.out) / "ckpt.pt", config.saves_shards(parallel.world_size())
        self.saver = checkpoint.Saver(
            ckpt, checked.manifest_sha256, config.keep, in_shards, lambda text: self.recorder.say(text)
        )

        # Records: console, metrics.jsonl, tracker.
        header = header_of(requested, self.tokens.manifest, checked.manifest_sha256, parallel.world_size(), self.placement)
        self.recorder = Recorder(config, self.state, header, self.tokens.n_blocks, self.resuming)
        self.recorder.say(self.describe(source))

    def train(self) -> None:
        """Run all stages that are left. Returns early, the state saved, when a signal asked for it."""
        config, state, cursor, recorder = self.config, self.state, self.state.cursor, self.recorder
        batches, watchdog = Prefetcher(self.tokens, self.my_samples(), device=self.placement.device), self.watchdog
        with self.folder, watchdog, recorder, batches, watchdog.phase("save"), self.saver, watchdog.phase("train step"):
            if self.resuming:
                state.ramp(config.stages[cursor.stage])
                recorder.complete(self.look)
            elif not self.enter_stage(batches):
                return
            while True:
                stage = config.stages[cursor.stage]
                state.freeze(stage)
                state.ramp(stage)
                while cursor.stage_tokens < stage.tokens:
                    # The step: gradients of the next batch_tokens, the rate that the schedule gives them, AdamW.
                    loss = self.micro_step.accumulate(state.model, batches)
                    cursor.advance(config.batch_tokens // config.model.seq_len, state.model.config)
                    cursor.stage_tokens += config.batch_tokens
                    lr = learning_rate(config.stages, cursor.stage, cursor.stage_tokens)
                    state.rewarm(stage, cursor.stage_tokens)
                    recorder.warn_of_dead(state.dead_after_growth(config.batch_tokens))
                    norm, skipped = guarded_step(state.optimizer, loss, lr, config.optim.grad_clip, not config.cuda_graph)
                    state.ramp(stage)  # for the next step, and for an evaluation before it
                    watchdog.heard()

                    # What is due, by tokens trained. A signal leaves no time to look at the model: --resume does.
                    stopping = self.stop.agreed(self.saver.wants_to_save)
                    stage_ends = cursor.stage_tokens >= stage.tokens
                    saving = stage_ends or self.crossed(config.save_interval) or self.stop.save_again
                    evaluating = stage_ends or self.crossed(config.eval_interval)
                    due = [evaluating, self.crossed(config.sample.interval)]
                    logging = any(due) or self.crossed(config.log_interval)
                    values = recorder.record_step(lr, logging, loss, norm, skipped)
                    if logging:
                        seen = {"due": due} if stopping and any(due) else self.look(*due)
                        recorder.log(values | seen, recorder.speed())
                    stopping = stopping or (evaluating and self.stop.agreed())
                    if stopping or saving:
                        self.save()
                    if stopping:
                        self.saver.wait()
                        recorder.say(f"stopped by a signal after step {recorder.step}; --resume goes on from here")
                        return
                if cursor.stage + 1 == len(config.stages):
                    return
                cursor.stage += 1
                cursor.stage_tokens = 0
                if not self.enter_stage(batches):
                    return

    def enter_stage(self, batches: Iterator) -> bool:
        """Grow the model where the stage says so, and look at its loss before and after. False where a signal stops that."""
        how = self.config.stages[self.state.cursor.stage].growth
        if how is None:
            return True
        if how.learning_steps():
            self.recorder.say(f"learning how to grow on {how.learning_steps()} batches")
        self.micro_step.forget()
        # Learning to grow replaces the weights at every step, so no graph is captured.
        plain = MicroStep(self.micro_step.micro_steps, graphed=False)

        def gradients() -> torch.Tensor:
            if self.stop.agreed():
                raise Stopped
            loss = plain.accumulate(self.state.model, batches)
            self.watchdog.heard()
            self.state.cursor.advance(self.config.batch_tokens // self.config.model.seq_len, self.state.model.config)
            return loss

        with self.recorder.paused():
            before = self.evaluate()
            rows = min(self.config.micro_batch, self.validation.tokens.n_blocks)
            probe = torch.from_numpy(self.validation.tokens.blocks(0, rows)[:, :-1]).to(self.placement.device)
        try:
            with self.watchdog.phase("growth"):
                receipt = self.state.grow(how, probe, gradients)
        except Stopped:  # the model is neither the old one nor the new one: nothing is saved
            self.recorder.say("stopped by a signal while learning how to grow; --resume goes on from the step before that")
            return False
        with self.recorder.paused():
            after = self.evaluate()
        receipt.loss_before, receipt.loss_after = before["val_loss"], after["val_loss"]
        self.recorder.record_growth(receipt, after)
        return True

    def look(self, evaluating: bool, sampling: bool) -> dict:
        """What a record says of the model itself."""
        with self.recorder.paused():
            values = self.evaluate() if evaluating else {}
            return values | ({"texts": self.writer(self.state.model, self.watchdog.heard)} if sampling else {})

    def evaluate(self) -> dict:
        """Mean loss on the fixed validation tokens, in nats per token and in bits per byte of their text."""
        with self.watchdog.phase("evaluation"):
            loss = self.validation(self.state.model, self.config.micro_batch, self.watchdog.heard)
        return {"val_loss": loss.nats_per_token, "val_bits_per_byte": loss.bits_per_byte}

    def save(self) -> None:
        with self.recorder.paused(), self.watchdog.phase("save"):
            self.saver.save(self.state)

    def crossed(self, interval: int | None) -> bool:
        """Whether the last step took the token count over a multiple of `interval`."""
        tokens = self.state.cursor.tokens
        return interval is not None and tokens // interval > (tokens - self.config.batch_tokens) // interval

    def my_samples(self) -> Iterator[tuple[int, int]]:
        """The (start, stop) of every micro-batch that this rank trains on, to the end of the run.

        A step takes the next batch of global sample numbers; micro-batches and ranks cut it into slices.
        """
        config, cursor, each, ranks = self.config, self.state.cursor, self.config.micro_batch, parallel.world_size()
        first = cursor.samples + parallel.rank() * each
        ahead = config.stages[cursor.stage + int(self.resuming) :]  # a stage that is resumed has grown already
        learning = sum(stage.growth.learning_steps() for stage in ahead if stage.growth)
        for number in range((config.steps_left(cursor) + learning) * self.micro_step.micro_steps):
            start = first + number * each * ranks
            yield start, start + each

    def describe(self, source: str | None) -> str:
        """The run that is about to begin, derived values included."""
        config, placement, cursor = self.config, self.placement, self.state.cursor
        model = self.state.model.config
        start = f"from {source} at {describe_tokens(cursor.tokens)} tokens" if source else f"from seed {config.seed}"
        start += " (there was no checkpoint to resume from)" if config.resume and not self.resuming else ""
        steps, dtype = config.steps_left(cursor), str(placement.dtype).removeprefix("torch.")
        amount, epoch = describe_tokens(steps * config.batch_tokens), describe_tokens(self.tokens.n_tokens)
        return (
            f"{config.out}: {model.outline()}, {n_params(model) / 1e6:.2f}M parameters, {start}\n"
            f"{steps} steps of {config.batch_tokens} tokens ({amount}) of {config.data.path} ({epoch} an epoch), "
            f"{flops_per_token(model) / 1e6:.1f} MFLOPs a token to begin with\n"
            f"{parallel.world_size()} × {placement.device.type}, {dtype}, {self.kernels} kernels, "
            f"{self.micro_step.micro_steps} × {config.micro_batch} sequences per device and step"
        )


def main(arguments: list[str]) -> None:
    usage = f"usage: {Path(sys.argv[0]).name} CONFIG [--field.name value ...]; --help after CONFIG lists all fields"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, f"{usage}\nCONFIG is a file, or one of {', '.join(presets())}", sep="\n")
        sys.exit(0 if arguments else 2)
    if arguments[0].startswith("--"):
        raise UserError(f"a config comes first, as in: {Path(sys.argv[0]).name} quickstart {arguments[0]} ...")
    try:
        run = Run(load(arguments[0], arguments[1:]))
        run.train()
    finally:
        lock.release_all()
    parallel.leave(run.stop.exit_code, run.placement.launch)


if __name__ == "__main__":
    with exits_cleanly():
        main(sys.argv[1:])
