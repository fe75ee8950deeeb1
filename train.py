"""Pre-train a Llama, stage by stage, and grow it in place between stages.

    python train.py config/quickstart.py                               one device
    torchrun --nproc_per_node 8 train.py config/1b.py --out out/1b     several; every field of the config can be overridden

A run follows from (data, config, seed) alone, however often it was stopped. It writes metrics.jsonl and ckpt.pt to `out`.
"""

import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import kernels
from nanostack import checkpoint, growth, parallel, run_folder, track
from nanostack.config import Train, describe_tokens, load
from nanostack.data import Prefetcher, Tokens, load_manifest, manifest_sha256, verify
from nanostack.errors import UserError, exits_cleanly
from nanostack.fit import check_batch
from nanostack.flops import flops_per_token, mfu, n_params, peak_flops
from nanostack.metrics import Clock, Display, Late, Metrics, header, profiler
from nanostack.micro_step import MicroStep
from nanostack.optimizer import guarded_step
from nanostack.sample import Writer
from nanostack.schedule import learning_rate
from nanostack.state import State

MAX_SKIPPED = 5  # steps in a row that were not finite: more than bad luck


class Diverged(UserError):
    """So many were."""


class Run:
    """What a run needs, set up in the order in which mistakes should be found; then its loop, top to bottom."""

    def __init__(self, config: Train):
        self.stop = parallel.StopFlag()
        self.placement = parallel.start(config.parallel, config.dtype, config.compile, config.cuda_graph)
        if self.placement.mesh is not None and any(stage.growth and stage.growth.width for stage in config.stages):
            raise UserError("width grows on one device only: grow the checkpoint with grow.py, or run one process")
        self.kernels = choose_kernels(config.kernels, self.placement)
        parallel.on_rank_0(track.check, config.track)
        parallel.on_rank_0(verify, config.data.path)
        self.manifest_sha256 = manifest_sha256(config.data.path)
        as_given, self.config = config, with_vocabulary(config)
        config = self.config
        state_bytes = 16 * n_params(config.shapes()[-1]) / self.placement.shards
        parallel.check_room(self.placement.device, state_bytes, "the largest stage, weights, gradients and moments,")
        if self.placement.device.type == "cuda":
            saved = (4 + 2 * getattr(torch, config.optim.moments).itemsize) * n_params(config.shapes()[-1])
            what = "the copy of weights and moments that becomes a checkpoint"
            parallel.on_rank_0(parallel.check_room, torch.device("cpu"), saved, what)
        # What runs in C takes less than what is traced; of several devices fit.py has an estimate only.
        slack = 1.5 if self.kernels == "c" or self.placement.mesh is not None else 1.0
        free = parallel.free_bytes(self.placement.device)
        shapes = (config.shapes()[-1], self.placement.dtype, self.kernels == "triton")
        parallel.on_rank_0(check_batch, config, *shapes, free, slack, self.placement.shards)  # the others have as much
        if config.cuda_graph and config.data.document_mask and self.kernels == "torch":
            raise UserError("--cuda_graph: attention within documents waits for the device in torch, which has to serve here")
        self.micro_steps = parallel.micro_steps(config.batch_tokens, config.micro_batch, config.model.seq_len)
        self.data = Tokens(config.data.path, "train", config.model.seq_len, config.seed)
        self.val = Tokens(config.data.path, "val", config.model.seq_len)
        self.val_blocks = max(1, min(self.val.n_blocks, config.data.val_tokens // config.model.seq_len))
        targets = self.val.blocks(0, self.val_blocks)[:, 1:]
        self.val_bytes = int(self.val.token_bytes[targets].sum())
        self.writer = Writer(config)

        self.out = Path(config.out)
        resume_from = parallel.on_rank_0(run_folder.claim, config)
        self.resuming = resume_from is not None
        source = resume_from or config.init_from
        if source:
            saved = checkpoint.load(source)
            checkpoint.check_fits(saved, source, config, self.manifest_sha256 if self.resuming else None)
            self.state = State.restore(saved, config.optim, self.placement)
            self.state.seed = config.seed
        else:
            self.state = State.create(config.model, config.optim, self.placement, config.seed)
        self.state.model.end_of_text = self.data.manifest["tokenizer"]["eot"] if config.data.document_mask else None
        self.cursor = self.state.cursor
        if not self.resuming:
            self.cursor.stage = self.cursor.stage_tokens = 0
        parallel.on_rank_0(run_folder.make_ready, config, self.resuming)
        now = self.cursor.stage
        before, later = (sum(stage_steps(config, s) for s in part) for part in (config.stages[:now], config.stages[now + 1 :]))
        self.step = before + self.cursor.stage_tokens // config.batch_tokens
        self.steps_left = later + max(0, -(-(self.stage.tokens - self.cursor.stage_tokens) // config.batch_tokens))
        ahead = config.stages[now + self.resuming :]
        self.batches_left = self.steps_left + sum(stage.growth.learning_steps() for stage in ahead if stage.growth)
        self.speaks = parallel.rank() == 0
        total = (self.step + self.steps_left) * config.batch_tokens
        self.display = Display(total, self.step * config.batch_tokens, self.speaks)
        self.metrics = Metrics(self.out / "metrics.jsonl", self.speaks, track.Tracking(config.track, self.out))
        head = header(as_given, self.data.manifest, self.manifest_sha256, parallel.world_size(), self.placement)
        at = (self.cursor.stage, self.cursor.samples)
        self.clock = Clock(self.metrics.resume(*at, head) if self.resuming else self.metrics.begin(head))
        self.peak = peak_flops(self.placement.device, self.placement.dtype)
        self.late = Late()
        self.micro_step = MicroStep(self.micro_steps, config.cuda_graph)
        self.saver = checkpoint.Saver(self.out / "ckpt.pt", self.manifest_sha256, config.keep)
        self.skipped_in_a_row: list[int] = []  # first sample of each
        self.last_log = (self.cursor.tokens, self.clock.seconds())
        self.display.say(self.describe(source))

    @property
    def stage(self):
        return self.config.stages[self.cursor.stage]

    def train(self) -> None:
        """All stages that are left. Returns early, the state saved, when a signal asked for it."""
        batches = Prefetcher(self.data, self.my_samples(), device=self.placement.device)
        tracing = profiler(self.config.profile if self.speaks else 0, self.steps_left, self.out / "trace.json")
        with self.display, self.metrics, batches, self.saver, tracing as tracer:
            if not self.resuming:
                self.enter_stage(batches)
            while True:
                self.state.freeze(self.stage)
                self.state.ramp(self.stage)
                while self.cursor.stage_tokens < self.stage.tokens:
                    self.train_step(batches)
                    tracer.step()
                    if self.stop.agreed():
                        self.save()
                        self.saver.wait()
                        self.display.say(f"stopped by a signal after step {self.step}; --resume goes on from here")
                        return
                if self.cursor.stage + 1 == len(self.config.stages):
                    return
                self.cursor.stage += 1
                self.cursor.stage_tokens = 0
                self.enter_stage(batches)

    def enter_stage(self, batches: Prefetcher) -> None:
        """Grow the model where the stage says so, and look at its loss before and after."""
        if self.stage.growth is None:
            return
        if steps := self.stage.growth.learning_steps():
            self.display.say(f"learning how to grow on {steps} batches")
        with self.clock.paused():
            before = self.evaluate()
            rows = min(self.config.micro_batch, self.val.n_blocks)
            probe = torch.from_numpy(self.val.blocks(0, rows)[:, :-1]).to(self.placement.device)
        self.micro_step.forget()
        plain = MicroStep(self.micro_steps, graphed=False)  # what learn mixes anew at every step is not captured
        receipt = self.state.grow(self.stage.growth, probe, lambda: self.gradients(batches, plain))
        with self.clock.paused():
            after = self.evaluate()
        receipt |= {"loss_before": before["val_loss"], "loss_after": after["val_loss"]}
        self.write_record({"loss": None, "lr": None, "grad_norm": None} | after | {"growth": receipt})
        self.display.say(growth.describe(receipt))
        if caution := growth.caution(receipt):
            self.display.say(f"warning: {caution}")
        self.last_log = (self.cursor.tokens, self.clock.seconds())

    def gradients(self, batches: Prefetcher, micro_step: MicroStep) -> torch.Tensor:
        """Put the gradients of the next batch_tokens into the model, and move the cursor past them. Returns their mean loss."""
        model, cursor, config = self.state.model, self.cursor, self.config
        loss = torch.zeros((), device=self.placement.device)
        for number in range(self.micro_steps):
            parallel.sync_gradients(model, now=number + 1 == self.micro_steps)
            loss += micro_step(model, *next(batches))
        cursor.advance(config.batch_tokens // config.model.seq_len, model.config)
        return parallel.mean(loss)

    def train_step(self, batches: Prefetcher) -> None:
        """One optimizer step on the next batch, then what is due after it."""
        cursor, config, first_sample = self.cursor, self.config, self.cursor.samples
        loss = self.gradients(batches, self.micro_step)
        cursor.stage_tokens += config.batch_tokens
        self.step += 1
        lr = learning_rate(config.stages, cursor.stage, cursor.stage_tokens)
        self.state.rewarm(self.stage, cursor.stage_tokens)
        grown = self.state.growth[-1] if self.state.growth else {}
        if cursor.tokens - grown.get("tokens", 0) == 2 * config.batch_tokens and grown:
            grown["dead"] = self.state.dead()
            if grown["dead"]:
                self.display.say(f"warning: in the second step after growth these have no gradient: {', '.join(grown['dead'])}")
        norm, skipped = guarded_step(self.state.optimizer, loss, lr, config.optim.clip, free=not config.cuda_graph)
        self.state.ramp(self.stage)  # for the next step, and for an evaluation before it

        stage_ends = cursor.stage_tokens >= self.stage.tokens
        evaluating = stage_ends or self.crossed(config.eval_interval)
        logging = evaluating or self.crossed(config.log_interval) or self.crossed(config.sample.interval)
        self.late.push(first_sample, loss, norm, skipped)
        measured = {}
        for sample, loss, norm, skipped in self.late.pop(wait=logging):
            self.count_skipped(sample, skipped)
            measured = {"loss": loss, "lr": lr, "grad_norm": norm}
        self.display.advance(self.step * config.batch_tokens, f"stage {cursor.stage}")
        if logging:
            self.log(measured, evaluating)
        if stage_ends or self.crossed(config.save_interval):
            self.save()

    def crossed(self, interval: int | None) -> bool:
        """Whether the last step took the token count over a multiple of `interval`."""
        tokens = self.cursor.tokens
        return interval is not None and tokens // interval > (tokens - self.config.batch_tokens) // interval

    def count_skipped(self, first_sample: int, skipped: float) -> None:
        """A step whose loss or gradient was not finite has changed nothing; several in a row end the run."""
        if not skipped:
            self.skipped_in_a_row.clear()
            return
        self.skipped_in_a_row.append(first_sample)
        size = self.config.batch_tokens // self.config.model.seq_len
        self.display.say(f"step skipped: loss or gradient not finite in samples {first_sample} to {first_sample + size - 1}")
        if len(self.skipped_in_a_row) >= MAX_SKIPPED:
            samples = f"{self.skipped_in_a_row[0]} to {first_sample + size - 1}"
            raise Diverged(
                f"{MAX_SKIPPED} steps in a row had a loss or gradient that is not finite, in samples {samples}. They left the "
                "weights alone; look at those samples, or lower the learning rate"
            )

    @torch.no_grad()
    def evaluate(self) -> dict:
        """Mean loss on the fixed validation tokens, in nats per token and in bits per byte of their text."""
        device, each, ranks = self.placement.device, self.config.micro_batch, parallel.world_size()
        nats = torch.zeros((), dtype=torch.float64, device=device)
        firsts = range(parallel.rank() * each, self.val_blocks + parallel.rank() * each, each * ranks)
        mine = [(min(first, self.val_blocks), min(first + each, self.val_blocks)) for first in firsts]
        ranges = [(start, stop) if start < stop else (0, 1) for start, stop in mine]
        with Prefetcher(self.val, ranges, device=device, as_text=True) as blocks:
            for (start, stop), (tokens_BT, targets_BT) in zip(mine, blocks, strict=True):
                loss = self.state.model(tokens_BT, targets_BT)
                if start < stop:  # else there was none left: gone along for the collectives, but not counted
                    nats += loss.double() * targets_BT.numel()
        if dist.is_initialized():
            dist.all_reduce(nats)
        parallel.reshard(self.state.model)
        nats = nats.item()
        per_token = nats / (self.val_blocks * self.config.model.seq_len)
        return {"val_loss": per_token, "val_bits_per_byte": nats / math.log(2) / max(1, self.val_bytes)}

    def log(self, measured: dict, evaluating: bool) -> None:
        """Write a record and a console line, with the speed since the last one."""
        tokens, seconds = self.cursor.tokens - self.last_log[0], self.clock.seconds() - self.last_log[1]
        speed = tokens / seconds if seconds > 0 else None
        with self.clock.paused():
            losses = self.evaluate() if evaluating else {"val_loss": None, "val_bits_per_byte": None}
            texts = {"texts": self.writer(self.state.model)} if self.crossed(self.config.sample.interval) else {}
        self.write_record(measured | losses | texts, speed)
        self.last_log = (self.cursor.tokens, self.clock.seconds())

    def write_record(self, values: dict, speed: float | None = None) -> None:
        cursor = self.cursor
        share = mfu(self.state.model.config, speed / parallel.world_size(), self.peak) if speed else None
        position = {"stage": cursor.stage, "step": self.step, "samples": cursor.samples, "tokens": cursor.tokens}
        ledger = {"flops": cursor.flops, "flops_exact": cursor.flops_exact, "epoch": self.data.epoch(cursor.samples)}
        timing = {"tokens_per_s": speed, "mfu": share, "seconds": self.clock.seconds()}
        record = position | ledger | values | timing
        self.metrics.write(record)
        self.display.log(record, self.step * self.config.batch_tokens)

    def save(self) -> None:
        with self.clock.paused():
            self.saver.save(self.state)

    def my_samples(self):
        """The (start, stop) of every micro-batch that this rank trains on, to the end of the run.

        A step takes the next batch of global sample numbers; micro-batches and ranks cut it into slices.
        """
        each, ranks = self.config.micro_batch, parallel.world_size()
        first = self.cursor.samples + parallel.rank() * each
        for number in range(self.batches_left * self.micro_steps):
            start = first + number * each * ranks
            yield start, start + each

    def describe(self, source) -> str:
        """What is about to run, derived values included."""
        config, model, placement = self.config, self.state.model.config, self.placement
        start = f"from {source} at {describe_tokens(self.cursor.tokens)} tokens" if source else f"from seed {config.seed}"
        start += " (there was no checkpoint to resume from)" if config.resume and not self.resuming else ""
        steps, dtype = self.steps_left, str(placement.dtype).removeprefix("torch.")
        amount, epoch = describe_tokens(steps * config.batch_tokens), describe_tokens(self.data.n_tokens)
        return (
            f"{config.out}: {model.n_layer} layers × {model.d_model}, {n_params(model) / 1e6:.2f}M parameters, {start}\n"
            f"{steps} steps of {config.batch_tokens} tokens ({amount}) of {config.data.path} ({epoch} an epoch), "
            f"{flops_per_token(model) / 1e6:.1f} MFLOPs a token to begin with\n"
            f"{parallel.world_size()} × {placement.device.type}, {dtype}, {self.kernels} kernels, "
            f"{self.micro_steps} × {config.micro_batch} sequences per device and step"
        )


def choose_kernels(name: str, placement: parallel.Placement) -> str:
    """Set the backend of all kernels. Returns the one that will run: triton, c or torch."""
    reason = kernels.unavailable_reason(placement.device)
    if reason is None and placement.device.type == "cuda" and not kernels.dispatch.launcher_compiler():
        reason = "it needs a C compiler (gcc or clang, or the one that CC names)."
    if reason is None and placement.device.type == "cpu" and placement.dtype != torch.float32:
        reason = "Triton's interpreter is right in float32 only; add --dtype float32"
    if name == "triton" and reason:
        raise UserError(f"--kernels triton: {reason}")
    if name == "c":
        reason = kernels.cpu.unavailable_reason() if placement.device.type == "cpu" else "they are for the CPU."
        if reason:
            raise UserError(f"--kernels c: {reason}")
    kernels.set_backend("torch" if name == "auto" and placement.device.type == "cuda" and reason else name)
    if name != "auto":
        return name
    if placement.device.type == "cuda":
        return "torch" if reason else "triton"
    return "torch" if kernels.cpu.unavailable_reason() else "c"


def with_vocabulary(config: Train) -> Train:
    """The config with the data's vocabulary, rounded up to 128, where it leaves it open."""
    n_vocab = load_manifest(config.data.path)["tokenizer"]["n_vocab"]
    wanted = config.model.vocab_size
    if wanted is None:
        return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=-(-n_vocab // 128) * 128))
    if wanted < n_vocab:
        raise UserError(f"model.vocab_size {wanted} is too small: {config.data.path} holds token ids up to {n_vocab - 1}")
    return config


def stage_steps(config: Train, stage) -> int:  # the last one is a whole one
    return -(-stage.tokens // config.batch_tokens)


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\nusage: train.py CONFIG.py [--field.name value ...]; train.py CONFIG.py --help lists all fields")
        sys.exit(0 if arguments else 2)
    run = Run(load(arguments[0], arguments[1:]))
    run.train()
    parallel.leave(run.stop)


if __name__ == "__main__":
    with exits_cleanly():
        main(sys.argv[1:])
