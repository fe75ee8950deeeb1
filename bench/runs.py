"""Finished run folders as the results of a study, so that they are summarised, tabulated and drawn by the same code.

Runs of one recipe, whatever their seed and length, are one arm. The deepest that never grew is "scratch", the target.
"""

import json
from pathlib import Path

from bench.speedup import read_run
from nanostack import checkpoint
from nanostack.errors import UserError

LENGTHS = ("tokens", "warmup_tokens", "decay_tokens")  # of a stage: not of the recipe
SAME_BUDGET = 1.1  # runs whose FLOPs differ by less are compared at one budget


def collect(folders: tuple[Path, ...]) -> dict:
    """Results as bench/study.py writes them, for `summarise` and `draw`. UserError for runs that cannot be compared."""
    runs = {str(folder): finished(folder) for folder in dict.fromkeys(folders)}
    _check_comparable(runs)
    _set_budgets(runs)
    recipes: dict[str, list[str]] = {}
    for name, run in runs.items():
        recipes.setdefault(run["recipe"], []).append(name)
    arms = {}
    for names in recipes.values():
        first, seeds = runs[names[0]], {}
        for name in sorted(names, key=lambda name: runs[name]["budget"]):
            seeds.setdefault(str(runs[name]["seed"]), []).append(name)
        for seed, of_seed in seeds.items():
            if len({runs[name]["budget"] for name in of_seed}) < len(of_seed):
                raise UserError(f"{', '.join(of_seed)} are one recipe, seed {seed} and number of FLOPs: give one of them")
        depths = [first["model"]["n_layer"]] if not first["grown_from"] else [*first["grown_from"], first["model"]["n_layer"]]
        label = f"{' → '.join(map(str, depths))} layers" + (f", {first['op']}" if first["grown_from"] else "")
        arm = {"label": label, "lr": first["lr"], "grows": bool(first["grown_from"]), "n_layer": depths[0], "seeds": seeds}
        arms[names[0]] = arm
    arms = _ordered(arms, runs)
    scratch = runs[next(iter(arms["scratch"]["seeds"].values()))[0]]
    return {
        "study": "runs",
        "question": "How many FLOPs did growth save?",
        "size": f"{len(runs)} runs",
        "budgets": sorted({run["budget"] for run in runs.values()}),
        "model": scratch["model"],
        "device": scratch["device"],
        "date": None,
        "git_commit": scratch["git_commit"],
        "versions": scratch["versions"],
        "manifest_sha256": scratch["manifest_sha256"],
        "arms": arms,
        "runs": runs,
    }


def finished(folder: Path) -> dict:
    """What there is to know of a run. UserError unless it is whole, and its learning rate has decayed."""
    header, records = read_run(folder)
    if "config" not in header:
        raise UserError(f"{folder} was trained before headers told the config: train it anew")
    config = header["config"]
    planned = sum(-(-stage["tokens"] // config["batch_tokens"]) for stage in config["stages"])
    steps = [record for record in records if record["loss"] is not None]
    evaluations = [record for record in records if record["val_loss"] is not None]
    if not steps or steps[-1]["step"] < planned or not evaluations or evaluations[-1]["step"] < planned:
        raise UserError(f"{folder} is not finished: resume it first")
    last, peak = records[-1]["lr"], max(record["lr"] for record in steps)
    if last > 0.2 * peak:
        raise UserError(f"{folder} ends at a learning rate of {last:g}, of {peak:g} at most: only decayed runs are compared")
    receipts = [record["growth"] for record in records if "growth" in record]
    needs = None
    if config["init_from"]:  # it may have been grown on disk
        receipts = checkpoint.load(folder / "ckpt.pt")["growth"]
        parent = Path(config["init_from"]).parent
        needs = parent if (parent / "metrics.jsonl").is_file() else None
    recipe = config | {"seed": None, "init_from": None, "log_interval": None, "eval_interval": None}
    recipe["stages"] = [{k: v for k, v in stage.items() if k not in LENGTHS} for stage in config["stages"]]
    return {
        "evaluations": _before(needs, steps[0]["tokens"] - steps[0]["step"] * config["batch_tokens"], evaluations),
        "growth": receipts[-1] if receipts else None,
        "grown_from": [receipts[0]["rules"].count("kept"), *(len(r["rules"]) for r in receipts[:-1])] if receipts else [],
        "op": receipts[-1]["op"] if receipts else None,
        "needs": None,
        "begins": 0,
        "seed": config["seed"],
        "lr": peak,
        "recipe": json.dumps([recipe, [[r["op"], r["layers"], r["width"]] for r in receipts]], sort_keys=True),
        "model": config["model"] | {"n_layer": len(receipts[-1]["rules"]) if receipts else config["model"]["n_layer"]},
        "val_tokens": config["data"]["val_tokens"],
        "document_mask": config["data"]["document_mask"],
    } | {name: header[name] for name in ("manifest_sha256", "device", "versions", "git_commit", "dtype")}


def _before(parent: Path | None, tokens: int, evaluations: list[dict]) -> list[dict]:
    """`evaluations` behind those of the run that they go on from, `tokens` into it; seconds are of both."""
    if parent is None:
        return evaluations
    records = [record for record in read_run(parent)[1] if record["tokens"] <= tokens]
    seconds = records[-1]["seconds"] if records else 0.0
    earlier = [record for record in records if record["val_loss"] is not None]
    return earlier + [e | {"seconds": e["seconds"] + seconds} for e in evaluations]


def _check_comparable(runs: dict) -> None:
    """Raise `UserError`, which names the difference, unless losses of the runs mean the same."""
    (first, one), *others = runs.items()
    for name, run in others:
        for what, a, b in (
            ("text or tokenizer (hash of the manifest)", run["manifest_sha256"], one["manifest_sha256"]),
            ("validation tokens", run["val_tokens"], one["val_tokens"]),
            ("context", run["model"]["seq_len"], one["model"]["seq_len"]),
            ("document mask", run["document_mask"], one["document_mask"]),
        ):
            if a != b:
                raise UserError(f"{name} and {first} cannot be compared: {what} is {a} there and {b} here")


def _set_budgets(runs: dict) -> None:
    """Give runs of about equal FLOPs one budget, that of the cheapest of them."""
    budget = 0.0
    for run in sorted(runs.values(), key=lambda run: run["evaluations"][-1]["flops"]):
        flops = run["evaluations"][-1]["flops"]
        budget = flops if flops > SAME_BUDGET * budget else budget
        run["budget"] = budget


def _ordered(arms: dict, runs: dict) -> dict:
    """The arms: scratch first, the deepest that never grew (of several recipes the best), then shallower ones, then grown."""

    def end(arm: dict) -> float:
        return min(runs[names[-1]]["evaluations"][-1]["val_loss"] for names in arm["seeds"].values())

    flat = [name for name, arm in arms.items() if not arm["grows"]]
    grown = [name for name, arm in arms.items() if arm["grows"]]
    if not flat or not grown:
        there = "only runs that grow" if grown else "no run that grows"
        raise UserError(f"there is {there}: give the target from scratch and at least one grown run")
    flat.sort(key=lambda name: (-arms[name]["n_layer"], end(arms[name])))
    wanted = set(arms[flat[0]]["seeds"])
    for name in flat + grown:
        if missing := wanted ^ set(arms[name]["seeds"]):
            raise UserError(f"{arms[name]['label']} ({name}) and {flat[0]} do not pair: seeds {', '.join(missing)} are missing")
    return {"scratch": arms[flat[0]]} | {name: arms[name] for name in flat[1:] + grown}
