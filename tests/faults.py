"""Plant faults in a copy of the repository, one at a time, and see which of them its tests catch.

    python tests/faults.py                      this tree
    python tests/faults.py OLD NEW --json out   both: exit code 1 if NEW's tests miss a fault that OLD's catch

A fault is a line of code that is changed, found by its text wherever the tree has it, and the test files whose business it is.
A suite that became faster must catch what it caught before.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

FORMER = {  # names that test files had
    "test_operations": "test_kernels",
    "test_rotary": "test_operations",
    "test_attention": "test_kernels_attention",
    "test_c": "test_kernels_c",
    "test_interface": "test_kernels_interface",
    "test_compiled": "test_kernels_compiled",
    "test_dataset": "test_data",
    "test_corpus": "test_prepare",
    "test_growing_runs": "test_train",
}


class Fault(NamedTuple):
    name: str
    tests: str  # stems of test files, and -k behind a colon
    changes: tuple[tuple[str, str], ...]  # text, what stands there instead; the first text that the tree has is taken
    interpreted: bool = False  # whether Triton's interpreter shows it


def fault(name: str, tests: str, *texts: str, interpreted: bool = False) -> Fault:
    return Fault(name, tests, tuple(zip(texts[::2], texts[1::2], strict=True)), interpreted)


FAULTS = (
    fault("rms_norm_backward", "test_operations:rms_norm", "dx = (dy_weight - x_hat * projection) * rstd",
          "dx = (dy_weight + x_hat * projection) * rstd", interpreted=True),
    fault("rotary_kernel", "test_rotary:rotary", "(x2 * cos + x1 * sin).to(out_ptr", "(x2 * cos - x1 * sin).to(out_ptr",
          interpreted=True),
    fault("swiglu_backward", "test_operations:swiglu", "(sigmoid * (1 + gate * (1 - sigmoid)))",
          "(sigmoid * (1 - gate * (1 - sigmoid)))", interpreted=True),
    fault("z_loss", "test_operations:cross_entropy", "softmax_scale = scale * (1 + 2 * Z_LOSS * lse)",
          "softmax_scale = scale * (1 + Z_LOSS * lse)", interpreted=True),
    fault("online_softmax", "test_operations:cross_entropy", "row_sum = row_sum * tl.exp2((row_max - new_max) * LOG2_E)",
          "row_sum = row_sum", interpreted=True),
    fault("causal_mask", "test_attention", "seen = column <= row if CAUSAL", "seen = column < row if CAUSAL", interpreted=True),
    fault("swiglu_in_c", "test_operations:swiglu", "dup[i] = round_(dyi * (g * sigmoid))", "dup[i] = round_(dyi * g)"),
    fault("linear_overwrites_gradient", "test_step:linear", "weight.grad.add_(dy_rows.t() @ x_rows)",
          "weight.grad.copy_(dy_rows.t() @ x_rows)"),
    fault("document_starts", "test_model test_operations", "starts_BT[:, 1:] = tokens_BT[:, :-1] == end_of_text",
          "starts_BT[:, 1:] = tokens_BT[:, 1:] == end_of_text"),
    fault("rope_scaling", "test_hf", "torch.lerp(frequencies / scaling.factor, frequencies,",
          "torch.lerp(frequencies, frequencies,"),
    fault("initial_spread", "test_model", "math.sqrt(2 / (5 * fan_in))", "math.sqrt(1 / fan_in)"),
    fault("cache_position", "test_model test_sample", "self.cos[start:end], self.sin[start:end]",
          "self.cos[:end], self.sin[:end]"),
    fault("warm_up", "test_schedule", "return self.lr * tokens / self.warmup_tokens",
          "return self.lr * (tokens - 1) / self.warmup_tokens", "return stage.lr * tokens / stage.warmup_tokens",
          "return stage.lr * (tokens - 1) / stage.warmup_tokens"),
    fault("rewarming", "test_schedule", "(1 - stage.rewarm_peak) * min(1.0, up - 1)", "(1 - stage.rewarm_peak) * (up - 1)"),
    fault("clipping", "test_step:clipped or copies_of_weights", "/ grad_clip, min=1.0)", "/ grad_clip, min=0.0)",
          "/ clip, min=1.0)", "/ clip, min=0.0)"),
    fault("rate_of_new_layers", "test_moments test_growing_runs", 'group["lr"] = lr * group.get("rate", 1.0)',
          'group["lr"] = lr'),
    fault("middle", "test_growth", "first = (n_layer - k) // 2", "first = 0"),
    fault("power_of_second_moment", "test_moments test_width", '"exp_avg_sq": 2', '"exp_avg_sq": 1'),
    fault("share_of_copies", "test_width", "share.append(1 / n if alpha is None else uneven)", "share.append(1.0)"),
    fault("noise_share", "test_growth", ".mul_(1 - noise).add_(", ".mul_(1).add_("),
    fault("ramp_never_ends", "test_growth test_growing_runs", "    if scale >= 1:\n", "    if scale > 1:\n"),
    fault("learned_parts", "test_learn", "D[self.part_of_row[name]]", "D[0 * self.part_of_row[name]]"),
    fault("ledger", "test_train test_checkpoint", "self.flops += float(tokens * flops_per_token(config))",
          "self.flops += float(tokens * flops_exact_per_token(config))"),
    fault("checkpoint_is_believed", "test_checkpoint", "    if actual != recorded:", "    if False:"),
    fault("lock_is_shared", "test_lock", "flock(descriptor, fcntl.LOCK_EX |", "flock(descriptor, fcntl.LOCK_SH |"),
    fault("past_may_change", "test_going_on", "if number < cursor.stage:", "if number < 0:"),
    fault("rewarmed_come_home", "test_moments:rate_of_their_own", 'group["params"].sort(key=place.__getitem__)', "pass"),
    fault("stop_a_step_later", "test_launch:step_at_hand", "self.number, self.save_again = self._asked, save_again\n",
          "self.number, self._late, self.save_again = getattr(self, '_late', 0), self._asked, save_again\n"),
    fault("checkpoints_kept", "test_train test_checkpoint", "len(others) - (keep - 1)", "len(others) - keep"),
    fault("permutation", "test_dataset", "        outside = out >= n", "        outside = out > n"),
    fault("block_over_shards", "test_dataset", "filled + len(piece), shard + 1, 0", "filled + len(piece), shard + 1, 1"),
    fault("duplicates", "test_corpus", "            elif digest in self.seen:", "            elif False:"),
    fault("rows_of_qkv", "test_hf", '"qkv": [heads, kv, kv]', '"qkv": [kv, kv, heads]'),
    fault("resumed_records", "test_train", 'record["samples"]) <= (stage, samples):',
          'record["samples"]) < (stage, samples):'),
    fault("exit_code", "test_mistakes test_config", 'if "RANK" in os.environ else sys.exit(2)',
          'if "RANK" in os.environ else sys.exit(1)'),
    fault("run_is_overwritten", "test_mistakes", '.exists()) and not self.config.overwrite:', ".exists()) and False:"),
    fault("top_p", "test_sample:probabilities", "likelier_BK = p_BK.cumsum(-1) - p_BK", "likelier_BK = p_BK.cumsum(-1)"),
    fault("window_of_a_task", "test_evaluate:rolling or loglikelihood", "[-seq_len - 1 : -1]", "[-seq_len : -1]",
          "max(0, end - 1 - seq_len) : end - 1", "max(0, end - seq_len) : end - 1"),
    fault("template_of_an_export", "test_bounds:keeps", "tokenizer.follow(state.bounds)  #", "#"),
    fault("growth_budget", "test_plan", "0.88 * math.log10(params)", "0.89 * math.log10(params)"),
    fault("row_that_spills", "test_compiled:configuration", "128: attention(128, 128, 8, 2, TMA=True),",
          "128: attention(128, 256, 4, 1, TMA=True),"),
    fault("row_too_low_for_wgmma", "test_compiled:configuration", "128: attention(128, 64, 8, 3, TMA=True),",
          "128: attention(16, 64, 8, 3, TMA=True),"),
    fault("row_of_narrow_loads", "test_compiled:configuration", '"swiglu_forward": {80: {ANY: row(4, BLOCK=1024)},',
          '"swiglu_forward": {80: {ANY: row(4, BLOCK=128)},'),
    fault("one_token", "test_compiled:configuration", "(kv_head + 1) * group, num_stages=1)", "(kv_head + 1) * group)"),
    fault("exact_flops", "test_flops", "d_attn(config) * (config.seq_len + 1)", "d_attn(config) * config.seq_len"),
    fault("muon_rows", "test_muon", "rows, found = self.rows_of(), []",
          "rows, found = {p: (len(p),) for p in self.rows_of()}, []"),
    fault("muon_skips", "test_muon", 'lr: lr * (1 - skipped) for lr', 'lr: lr + 0 * skipped for lr'),
    fault("muon_of_another_size", "test_muon", "(0.2 * shape[-1] ** 0.5)", "(0.2 * shape[0] ** 0.5)"),
    fault("muon_shard_of_an_owner", "test_parallel:sharded", "[by_shard[rank % self.shards] for by_shard in rows]",
          "[by_shard[0] for by_shard in rows]"),
    fault("other_optimizer_resumes", "test_muon", "which {config.optim.name} cannot go on from", "{config.optim.name}"),
    fault("loops_of_flops", "test_untie", "return 6 * n_params(config.unrolled())", "return 6 * n_params(config)"),
    fault("untie_keeps_the_loop", "test_untie", 'base.n_layer // len(layers) if op == "untie" else base.loops', "1"),
    fault("scale_of_moments", "test_residual_scale", "mul_(share ** POWER[key])", "mul_(share)"),
    fault("scale_of_outputs", "test_residual_scale", "local_shard(weight).div_(share)", "pass"),
    fault("scale_in_exports", "test_untie", "                whole = whole * scale", "                pass"),
    fault("speedup_at_a_budget", "test_speedup", "for b, point in of_control.items() if b <= budget]",
          "for b, point in of_control.items()]"),
    fault("budgets_of_an_arm", "test_study:budgets", "return not self.budgets or any(", "return True or any("),
    fault("growth_at_decay", "test_study:growth_just", "not last.growth.learning_steps() and", "True and"),
    fault("batch_of_an_arm", "test_study:budgets", "return arm.batch_tokens or self.size.batch_tokens",
          "return self.size.batch_tokens"),
    fault("pinned_packages", "test_sources:packages",
          'if pin not in (None, package.version, package.version.partition("+")[0]):', "if False:"),
    fault("prose_in_code", "test_prose", 'NOT_PROSE = {"pre", ', 'NOT_PROSE = {"prey", '),
    fault("seeds_told_twice", "test_quickstart:together", 'if twice := arms[arm]["seeds"].keys()', 'if twice := set()'),
    fault("bias_of_a_silent_layer", "test_variants:depth",
          '"attn.out.weight", "attn.out.bias", "mlp.down.weight", "mlp.down.bias")', '"attn.out.weight", "mlp.down.weight")'),
    fault("biases_as_gains", "test_variants:width", '(1.0 if name.endswith("bias") else', '(1.0 if False else'),
    fault("gain_of_heads", "test_rotary:norm_rotary", "mine1[i] += turned1 * n1;", "mine1[i] += g1 * n1;"),
    fault("yarn_of_angles", "test_architectures", "places[0]), math.ceil(places[1])", "places[0]), math.floor(places[1])"),
    fault("sliding_window", "test_architectures:random", "if window is not None and window < seq_len:", "if False:"),
    fault("tied_head_of_its_own", "test_architectures:random", "if config.tie_embeddings and weights.head_of_its_own():",
          "if False:"),
    fault("tokenizer_of_qwen2", "test_architectures:qwens",
          " else dataclasses.replace(config, out_bias=True)", " else config"),
    fault("single_file_first", "test_architectures:random", "        if single.is_file():\n            if index",
          "        if single.is_file() and not index.is_file():\n            if index"),
)  # fmt: skip


def sources(tree: Path) -> dict[Path, str]:
    """The files in which faults are planted, with their texts."""
    files = [path for name in ("nanostack", "kernels", "study") for path in (tree / name).rglob("*.[pc]*") if path.is_file()]
    return {path: path.read_text() for path in files if path.suffix in (".py", ".c")}


def planted(one: Fault, texts: dict[Path, str]) -> tuple[Path, str] | None:
    """The file that the fault is about, and its text with it; None unless one place has what it changes."""
    for text, instead in one.changes:
        found = [path for path, whole in texts.items() if text in whole]
        if len(found) == 1 and texts[found[0]].count(text) == 1:
            return found[0], texts[found[0]].replace(text, instead)
    return None


def plant(one: Fault, tree: Path) -> bool:
    """Change the one place that the fault is about. Returns False for a tree that has no such place yet."""
    if (changed := planted(one, sources(tree))) is None:
        return False
    changed[0].write_text(changed[1])
    return True


def caught(one: Fault, tree: Path) -> bool | None:
    """Whether a test that is named fails in a copy of `tree` with the fault; None where it cannot be planted."""
    names, _, chosen = one.tests.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / tree.name
        ours = subprocess.run(["git", "ls-files", "-z"], cwd=tree, capture_output=True, text=True, check=True).stdout
        for name in filter(None, ours.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / name, copy / name, follow_symlinks=False)
        if not plant(one, copy):
            return None
        files = []
        for name in names.split():
            files += [*copy.glob(f"tests/**/{name}.py"), *copy.glob(f"tests/**/{FORMER.get(name, name)}.py")]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, dict.fromkeys(files))]
        command += ["-k", chosen] if chosen else []
        environment = os.environ | {"PYTHONPATH": str(copy), "CI": "true"}
        environment |= {"TRITON_INTERPRET": "1"} if one.interpreted else {}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"fault {one.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


SAID = {True: "caught", False: "MISSED", None: "not there yet"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--only", nargs="+", default=[fault.name for fault in FAULTS], metavar="FAULT")
    parser.add_argument("--json", type=Path, help="where to write what was caught")
    command = parser.parse_args()
    found: dict[str, dict[str, bool]] = {}
    for number, one in enumerate(fault for fault in FAULTS if fault.name in command.only):
        began = time.monotonic()
        by_tree = {tree.name: caught(one, tree.resolve()) for tree in command.trees}
        *_, newest = by_tree.values()
        if newest is None:
            raise SystemExit(
                f"fault {one.name}: {command.trees[-1]} does not have its text in one place; change tests/faults.py with it"
            )
        found[one.name] = {name: bool(is_caught) for name, is_caught in by_tree.items()}
        told = ", ".join(f"{name}: {SAID[is_caught]}" for name, is_caught in by_tree.items())
        print(f"{number + 1:2}  {one.name:28} {told}  ({time.monotonic() - began:.0f} s)", flush=True)
        if command.json:
            command.json.write_text(json.dumps(found, indent=1) + "\n")
    lost = [name for name, by_tree in found.items() if list(by_tree.values())[-1] < max(by_tree.values())]
    print(
        f"{len(found)} faults; "
        + ", ".join(f"{sum(f[t] for f in found.values())} caught by {t}" for t in next(iter(found.values())))
    )
    if lost:
        print(f"error: no longer caught: {', '.join(lost)}", file=sys.stderr)
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
