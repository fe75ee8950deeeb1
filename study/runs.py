"""Finished run folders as the results of a study, so that they are summarised, tabulated and drawn by the same code.

Runs of one recipe, whatever their seed and length, are one arm; so are runs whose learning rates or times of growth differ from
budget to budget. "scratch" never grew and has the shape of the grown models.
"""

import dataclasses
import json
import statistics
from pathlib import Path

from nanostack import checkpoint
from nanostack.errors import UserError
from nanostack.model import LlamaConfig
from nanostack.runs import read_run

LENGTHS = ("tokens", "warmup_tokens", "decay_tokens")  # of a stage: not of the recipe
RATES = ("lr", "min_lr")
TEXT = ("tokenizer", "training text", "validation text")
SAME_BUDGET = 1.03  # runs whose FLOPs differ by less are compared at one budget


def collect(folders: tuple[Path, ...]) -> dict:
    """Results as study/plan.py writes them, for `summarise` and `draw`. UserError for runs that cannot be compared."""
    runs = {str(folder): finished(folder) for folder in dict.fromkeys(folders)}
    _check_comparable(runs)
    _set_budgets(runs)
    vocabulary = max(run["model"]["vocab_size"] or 1 for run in runs.values())
    for run in runs.values():
        run["model"] = run["model"] | {"vocab_size": run["model"]["vocab_size"] or vocabulary}
    arms = {}
    for names in _recipes(runs):
        first, seeds = runs[names[0]], {}
        for name in sorted(names, key=lambda name: runs[name]["budget"]):
            seeds.setdefault(str(runs[name]["seed"]), []).append(name)
        for seed, of_seed in seeds.items():
            if len({runs[name]["budget"] for name in of_seed}) < len(of_seed):
                raise UserError(f"{', '.join(of_seed)} are one recipe, seed {seed} and number of FLOPs: give one of them")
        depths = [first["model"]["n_layer"]] if not first["grown_from"] else [*first["grown_from"], first["model"]["n_layer"]]
        label = f"{' → '.join(map(str, depths))} layers"
        label += f", {first['op'] or 'wider'} at {first['at']:.0%} of the FLOPs" if first["grown_from"] else ""
        if any(label == other["label"] for other in arms.values()):
            label += f" ({Path(names[0]).name})"
        arm = {"label": label, "grows": bool(first["grown_from"]), "n_layer": depths[0]}
        arm |= {"model": first["model"], "seeds": seeds}
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


def _recipes(runs: dict) -> list[list[str]]:
    """Names of the runs of each recipe. Where runs of one budget differ in rates or in when they grew, these are of it too."""
    alike: dict[str, list[str]] = {}
    for name, run in runs.items():
        alike.setdefault(run["recipe"], []).append(name)
    found = []
    for names in alike.values():
        ways = {(runs[name]["budget"], runs[name]["tuned"]) for name in names}
        one_a_budget = len(ways) == len({budget for budget, _ in ways})
        apart: dict[str, list[str]] = {}
        for name in names:
            apart.setdefault("" if one_a_budget else runs[name]["tuned"], []).append(name)
        found += apart.values()
    return found


def finished(folder: Path) -> dict:
    """What there is to know of a run. UserError unless it is whole, and its learning rate has decayed."""
    header, records = read_run(folder)
    try:
        return described(folder, header, records)
    except (LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}/metrics.jsonl lacks what this version of train.py writes ({why}): train it anew") from error


def described(folder: Path, header: dict, records: list[dict]) -> dict:
    """`finished`, of records that are as they should be."""
    if "config" not in header or not all("loss" in record and "val_loss" in record for record in records):
        raise UserError(f"{folder} was not written by this version of train.py: train it anew")
    config = header["config"]
    planned = sum(-(-stage["tokens"] // config["batch_tokens"]) for stage in config["stages"])
    steps = [record for record in records if record["loss"] is not None]
    evaluations = [record for record in records if record["val_loss"] is not None]
    if not steps or steps[-1]["step"] < planned:
        raise UserError(f"{folder} is not finished: resume it first")
    if not evaluations or evaluations[-1]["step"] < planned:
        raise UserError(f"{folder} has no validation loss at its end: not a finite one, or none was measured")
    last = len(config["stages"]) - 1
    while config["stages"][last]["continues"]:
        last -= 1
    rate, end = config["stages"][last]["lr"], records[-1]["lr"]
    if end > 0.2 * rate:
        raise UserError(f"{folder} ends at a learning rate of {end:g}, of {rate:g} at most: only decayed runs are compared")
    receipts = [record["growth"] for record in records if "growth" in record]
    if config["init_from"]:  # it may have been grown on disk
        receipts = checkpoint.load(folder / "ckpt.pt")["growth"]
    evaluations = _with_ancestors(folder, config, records)
    at = None
    if receipts:
        before = [e["flops"] for e in evaluations if e["tokens"] <= receipts[-1]["tokens"]]
        if not before:
            raise UserError(f"{folder} was grown from a run whose metrics.jsonl is gone: its curve before growth is not known")
        at = before[-1] / evaluations[-1]["flops"]
    recipe = config | {"seed": None, "init_from": None, "log_interval": None, "eval_interval": None}
    recipe["stages"] = [{k: v for k, v in stage.items() if k not in (*LENGTHS, *RATES)} for stage in config["stages"]]
    recipe["model"] = config["model"] | {"vocab_size": None}  # given, or left to the text: the same
    rates = [[stage[name] for name in RATES] for stage in config["stages"]]
    return {
        "evaluations": evaluations,
        "growth": receipts[-1] if receipts else None,
        "grown_from": [receipts[0]["rules"].count("kept"), *(len(r["rules"]) for r in receipts[:-1])] if receipts else [],
        "op": receipts[-1]["op"] if receipts else None,
        "needs": None,
        "begins": 0,
        "seed": config["seed"],
        "stage": {"lr": rate},
        "at": at,
        "recipe": json.dumps([recipe, [[r["op"], r["layers"], r["width"]] for r in receipts]], sort_keys=True),
        "tuned": json.dumps([rates, at and round(at, 2)]),
        "end_rate": end / rate,
        "model": _grown(config["model"], receipts),
        "val_tokens": config["data"]["val_tokens"],
        "document_mask": config["data"]["document_mask"],
        "text": header.get("text", {}),
    } | {name: header[name] for name in ("manifest_sha256", "device", "versions", "git_commit", "dtype")}


def _grown(model: dict, receipts: list[dict]) -> dict:
    """The shape of a model after its growths, with fields that it may not have had yet when it was trained."""
    model = dataclasses.asdict(LlamaConfig(**model))
    for receipt in receipts:
        wider = (receipt["width"] or {}).get("to", {})
        times = len(receipt["rules"]) / model["n_layer"]
        if receipt["op"] == "untie":
            model["loops"] = round(model["loops"] / times)
        elif receipt.get("residual") == "keep":
            model["residual_scale"] *= times
        model |= {"n_layer": len(receipt["rules"])} | {k: v for k, v in wider.items() if k in model}
    return model


def _with_ancestors(folder: Path, config: dict, records: list[dict]) -> list[dict]:
    """The evaluations of a run behind those of the runs it went on from, as far as their folders are there; seconds are of
    all of them."""
    evaluations = [record for record in records if record["val_loss"] is not None]
    parent = Path(config["init_from"]).parent if config["init_from"] else None
    if parent is None or not (parent / "metrics.jsonl").is_file():
        return evaluations
    first = next(record for record in records if record["loss"] is not None)
    begun = first["tokens"] - first["step"] * config["batch_tokens"]
    header, of_parent = read_run(parent)
    before = [e for e in _with_ancestors(parent, header["config"], of_parent) if e["tokens"] <= begun]
    seconds = before[-1]["seconds"] if before else 0.0
    return before + [e | {"seconds": e["seconds"] + seconds} for e in evaluations]


def _check_comparable(runs: dict) -> None:
    """Raise `UserError`, which names the difference, unless losses of the runs mean the same."""
    (first, one), *others = runs.items()
    for name, run in others:
        for what, a, b in (
            *((what, run["text"].get(what), one["text"].get(what)) for what in TEXT),
            ("prepared text (hash of the manifest)", run["manifest_sha256"], one["manifest_sha256"]),
            ("number of validation tokens", run["val_tokens"], one["val_tokens"]),
            ("context", run["model"]["seq_len"], one["model"]["seq_len"]),
            ("document mask", run["document_mask"], one["document_mask"]),
        ):
            if a != b:
                raise UserError(f"{name} and {first} cannot be compared: the {what} is {a} in the first and {b} in the second")
        if abs(run["end_rate"] - one["end_rate"]) > 0.05:
            ends = f"{run['end_rate']:.0%} and {one['end_rate']:.0%}"
            raise UserError(f"{name} and {first} cannot be compared: they end at {ends} of their learning rate")


def _set_budgets(runs: dict) -> None:
    """Give runs of about equal FLOPs one budget, that of the cheapest of them."""
    budget = 0.0
    for run in sorted(runs.values(), key=lambda run: run["evaluations"][-1]["flops"]):
        flops = run["evaluations"][-1]["flops"]
        budget = flops if flops > SAME_BUDGET * budget else budget
        run["budget"] = budget


def _ordered(arms: dict, runs: dict) -> dict:
    """The arms: scratch first, the shape of the grown models (of several recipes the best), then others, then grown ones."""

    def end(arm: dict) -> float:
        """Mean loss over the seeds at the largest budget."""
        return statistics.mean(runs[names[-1]]["evaluations"][-1]["val_loss"] for names in arm["seeds"].values())

    flat = [name for name, arm in arms.items() if not arm["grows"]]
    grown = [name for name, arm in arms.items() if arm["grows"]]
    if not flat or not grown:
        there = "only runs that grow" if grown else "no run that grows"
        raise UserError(f"there is {there}: give the target from scratch and at least one grown run")
    sizes = {name: arm["model"] | {"residual_scale": None} for name, arm in arms.items()}  # which makes no other size
    target = max((sizes[name] for name in grown), key=lambda model: model["n_layer"])
    flat.sort(key=lambda name: (sizes[name] != target, end(arms[name])))
    if sizes[flat[0]] != target:
        raise UserError(f"there is no run of the target ({target['n_layer']} layers × {target['d_model']}) from scratch")
    wanted = set(arms[flat[0]]["seeds"])
    for name in flat + grown:
        if missing := wanted ^ set(arms[name]["seeds"]):
            raise UserError(f"{arms[name]['label']} ({name}) and {flat[0]} do not pair: seeds {', '.join(missing)} are missing")
        of_seed = {seed: [runs[run]["budget"] for run in names] for seed, names in arms[name]["seeds"].items()}
        if len(set(map(tuple, of_seed.values()))) > 1:
            told = "; ".join(f"seed {seed}: {', '.join(f'{b:.3g}' for b in budgets)}" for seed, budgets in of_seed.items())
            raise UserError(f"{arms[name]['label']} ({name}) has not the same FLOPs with every seed: {told}")
    return {"scratch": arms[flat[0]]} | {name: arms[name] for name in flat[1:] + grown}
