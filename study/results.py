"""What growth saves: FLOPs(scratch) / FLOPs(grown, base included) − 1 at equal validation loss.

Every point of every curve of a study is the end of a fully decayed run; seeds are paired, and the interval is Student's t at
95 %. Between two points a curve is a straight line of loss over log FLOPs. A curve that does not come down to the target, or
does not stay below it, has not reached it: then there is no number.
"""

import itertools
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from nanostack.errors import UserError
from nanostack.flops import flops_per_token, n_params
from nanostack.model import LlamaConfig

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # by degrees of freedom, from 1


def read_results(path: Path) -> dict:
    """What study/plan.py has written, and whole: every run that is named is there and has ended somewhere."""
    try:
        results = json.loads(path.read_text())
        runs = results["runs"]
        named = [name for arm in results.get("arms", {}).values() for of_seed in arm["seeds"].values() for name in of_seed]
        for name in (*named, *runs):
            runs[name]["evaluations"][-1]["val_loss"]
            runs[runs[name]["needs"] or name]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold results of a study; move it away, or restore it") from error
    return results


def curve(records: list[dict]) -> list[tuple[float, float]]:
    """(FLOPs spent, validation loss in nats per token) of every evaluation, in order. A growth costs no FLOPs."""
    return [(record["flops"], record["val_loss"]) for record in records if record["val_loss"] is not None]


def flops_to_reach(points: list[tuple[float, float]], loss: float) -> float | None:
    """FLOPs at which a curve first comes down to `loss`, linear between evaluations; None if it never does."""
    if points and points[0][1] <= loss:
        return points[0][0]
    for (flops_a, loss_a), (flops_b, loss_b) in itertools.pairwise(points):
        if loss_b <= loss < loss_a:
            return flops_a + (flops_b - flops_a) * (loss_a - loss) / (loss_a - loss_b)
    return None


def speedup(scratch: list[tuple[float, float]], grown: list[tuple[float, float]]) -> float | None:
    """Speedup as a fraction at the last loss of `scratch`; None if `grown` never reaches it."""
    flops, loss = scratch[-1]
    needed = flops_to_reach(grown, loss)
    return None if needed is None else flops / needed - 1


@dataclass(frozen=True)
class Crossing:
    """Where a curve of decayed points comes down to a loss, for good."""

    flops: float
    at_most: bool = False  # the first point is below already: it was reached with fewer FLOPs


def crossing(points: list[tuple[float, float]], loss: float) -> Crossing | None:
    """Where (FLOPs, loss) points, in order of FLOPs, come down to `loss` for good, by lines over log FLOPs; None if nowhere."""
    below = [one <= loss for _, one in points]
    if not any(below) or not all(below[below.index(True) :]):
        return None
    first = below.index(True)
    if first == 0:
        return Crossing(points[0][0], at_most=True)
    (flops_a, loss_a), (flops_b, loss_b) = points[first - 1 : first + 1]
    share = (loss_a - loss) / (loss_a - loss_b)
    return Crossing(math.exp(math.log(flops_a) + share * (math.log(flops_b) - math.log(flops_a))))


def mean_and_interval(values: list[float]) -> dict:
    """Mean, and the half-width of its 95 % interval by Student's t; None for a single value."""
    n, mean = len(values), statistics.mean(values)
    half = t_95(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": mean, "half_width": half, "values": values}


def t_95(freedom: int) -> float:
    """Student's t for 95 %, two-sided; beyond the table by its expansion around the normal quantile."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def ends_of(results: dict, arm: str, seed: str) -> dict[float, tuple[str, dict]]:
    """{budget: (run, its last evaluation)} of an arm and seed, in order of budget: the fully decayed points."""
    named = {results["runs"][name]["budget"]: name for name in results["arms"][arm]["seeds"].get(seed, ())}
    return {b: (named[b], results["runs"][named[b]]["evaluations"][-1]) for b in sorted(named.keys() - {None})}


def path_of(results: dict, name: str) -> list[dict]:
    """The evaluations on the way to the end of a run, those of the runs it started from included; seconds are of all of it."""
    run = results["runs"][name]
    if run["needs"] is None:
        return run["evaluations"]
    before = [e for e in path_of(results, run["needs"]) if e["tokens"] <= run["begins"]]
    seconds = before[-1]["seconds"] if before else 0.0
    return before + [e | {"seconds": e["seconds"] + seconds} for e in run["evaluations"]]


def at_best_pace(results: dict) -> dict:
    """Results of a study in which a run's seconds are its tokens at the pace of its kind, the runs with as many FLOPs per token
    and its optimizer: as it was measured with nothing beside (study/pace.py), or else that of the fastest tenth of them.

    A study runs for hours beside other work, and is paused: seconds of a single run say when it ran rather than how fast,
    and the median says how busy the machine was.
    """
    runs, kinds, paces = results["runs"], {}, {}
    for name, run in runs.items():
        flops = next((e["flops"] for e in reversed(path_of(results, name)) if e["tokens"] <= run["begins"]), 0)
        end, tokens = run["evaluations"][-1], run["evaluations"][-1]["tokens"] - run["begins"]
        of_token = round((end["flops"] - flops) / max(tokens, 1))  # 0 where a run that it needs has diverged
        kinds[name] = pace_name(of_token, name, run.get("batch_tokens"))
        paces.setdefault(kinds[name], []).append(end["seconds"] / max(tokens, 1))
    best = {kind: sorted(found)[len(found) // 10] for kind, found in paces.items()} | results.get("pace", {})
    paced = {
        name: run
        | {"evaluations": [e | {"seconds": (e["tokens"] - run["begins"]) * best[kinds[name]]} for e in run["evaluations"]]}
        for name, run in runs.items()
    }
    spent = sum(run["evaluations"][-1]["seconds"] for run in runs.values())
    return results | {"runs": paced, "best_pace": True, "seconds": spent}


def pace_name(flops_per_token: float, run: str, batch_tokens: int | None) -> str:
    """What runs of one kind share: FLOPs per token, the optimizer that a run's name tells, a batch that is not the study's."""
    return f"{flops_per_token:.0f}{'-muon' if '-muon-' in run else ''}" + (f"-{batch_tokens}" if batch_tokens else "")


def grown_after(results: dict, name: str | None) -> int:
    """Tokens before the last growth on the way to the end of a run; 0 if there is none."""
    while name is not None:
        run = results["runs"][name]
        if run["growth"]:
            return run["growth"]["tokens"]
        name = run["needs"]
    return 0


def gain(results: dict, arm: str, seed: str, count: str, budget: float | None = None, control: str = "scratch") -> dict | None:
    """Speedup of an arm at the loss of a control at a budget, the control's largest unless given: a fraction, and whether it
    may be more. None where the arm does not reach it, and where the control has no point there.

    `count` is flops, flops_exact or seconds. The control itself must have come down to that loss, and for good. Where the arm's
    first decayed point is below already, its undecayed curve after growth gives a bound.
    """

    def points(name: str) -> dict[float, tuple[float, float]]:
        ends = ends_of(results, name, seed)
        return {b: (path_of(results, run)[-1][count], end["val_loss"]) for b, (run, end) in ends.items()}

    of_control = points(control)
    budget = max(of_control, default=None) if budget is None else budget
    if budget not in of_control:
        return None
    before, target = [point for b, point in of_control.items() if b <= budget], of_control[budget][1]
    own, needed = crossing(before, target), crossing(list(points(arm).values()), target)
    if own is None or needed is None or (own.at_most and len(before) > 1):
        return None
    at_least = needed.at_most and arm != control
    if at_least:
        first = next(iter(ends_of(results, arm, seed).values()))[0]
        way = [e for e in path_of(results, first) if e["tokens"] > grown_after(results, first)]
        needed = replace(needed, flops=flops_to_reach([(e[count], e["val_loss"]) for e in way], target))
    return {"gain": own.flops / needed.flops - 1, "at_least": at_least}


def over_gains(
    results: dict, arm: str, count: str, budget: float | None = None, control: str = "scratch"
) -> tuple[dict | None, list[float]]:
    """Mean and interval of `gain` over the seeds, None unless all reach the loss; and the gains of those that do."""
    gains = [gain(results, arm, seed, count, budget, control) for seed in results["arms"]["scratch"]["seeds"]]
    reached = [one for one in gains if one is not None]
    values, at_least = [one["gain"] for one in reached], any(one["at_least"] for one in reached)
    if not reached or len(reached) < len(gains):
        return None, values
    known = mean_and_interval(values) | {"at_least": at_least}
    return known | ({"half_width": None} if at_least else {}), values  # a mean of bounds has no interval


def summarise(results: dict) -> dict:
    """What a study has found: per arm losses, speedups by both counts, and the difference to the best base that never grew.

    Lists go by budget, with None where an arm has no point; all other numbers are means over seeds with their interval.
    A base is an arm that never grows and has fewer parameters than scratch, the target. The verdict of a budget is that of the
    best grown arm against the base that is hardest on it: growth pays where it is below every base beyond its interval, and
    does not where it is above one.
    """
    arms, seeds, budgets = results["arms"], list(results["arms"]["scratch"]["seeds"]), results["budgets"]
    losses = {
        name: {seed: {b: end["val_loss"] for b, (_, end) in ends_of(results, name, seed).items()} for seed in seeds}
        for name in arms
    }

    def over_seeds(budget: float, arm: str) -> dict | None:
        """The loss of an arm; None unless there is one for every seed."""
        found = [losses[arm][seed].get(budget) for seed in seeds]
        return None if None in found else mean_and_interval(found)

    def best(names: list[str], budget: float) -> str | None:
        found = {name: loss["mean"] for name in names if (loss := over_seeds(budget, name))}
        return min(found, key=found.get) if found else None

    size = {
        name: n_params(LlamaConfig(**results["model"] | arm.get("model", {"n_layer": arm["n_layer"]})))
        for name, arm in arms.items()
    }
    flat = [name for name, arm in arms.items() if not arm["grows"] and size[name] < size["scratch"]]
    bases = [best(flat, b) for b in budgets]
    answer = {}
    for name, arm in arms.items():
        found = {"label": arm["label"], "grows": arm["grows"]}
        rates = {b: results["runs"][run]["stage"]["lr"] for b, (run, _) in ends_of(results, name, seeds[0]).items()}
        found["lrs"] = [rates.get(b) for b in budgets]
        found["losses"] = [over_seeds(b, name) for b in budgets]
        found["minus_base"] = [
            difference(results, name, base, b) if base else None for b, base in zip(budgets, bases, strict=True)
        ]
        for count in ("flops", "flops_exact"):
            found[f"speedup_{count}"], found[f"reached_{count}"] = over_gains(results, name, count)
        answer[name] = found
    verdicts = []
    for budget in budgets:
        grown = best([name for name, arm in arms.items() if arm["grows"]], budget)
        against = [
            {"grown": grown, "base": base, "pays": decided(less)} | less
            for base in flat
            if grown and (less := difference(results, grown, base, budget))
        ]
        verdicts.append(max(against, key=lambda one: (HARD.index(one["pays"]), one["mean"]), default=None))
    pays_from = None
    for budget, verdict, target in reversed(list(zip(budgets, verdicts, answer["scratch"]["losses"], strict=True))):
        if target is None:  # a point of grown arms alone, between two budgets
            continue
        if not (verdict and verdict["pays"]):
            break
        pays_from = budget
    about = ("study", "question", "size", "budgets", "model", "device", "date", "git_commit", "versions", "manifest_sha256")
    found = {"seeds": seeds, "arms": answer, "bases": bases, "verdicts": verdicts, "pays_from": pays_from}
    return {key: results[key] for key in about} | found


def decided(difference: dict) -> bool | None:
    """Whether a difference is below zero; None where its interval holds zero, or there is none: one seed decides nothing."""
    if difference["half_width"] is None or abs(difference["mean"]) <= difference["half_width"]:
        return None
    return difference["mean"] < 0


def percent(arm: dict, count: str, n_seeds: int) -> str:
    """The speedup of an arm of a summary."""
    return gain_said(arm[f"speedup_{count}"], arm[f"reached_{count}"], n_seeds)


def gain_said(gain: dict | None, reached: list[float], n_seeds: int) -> str:
    """What `over_gains` found, in a cell of a table."""
    if gain is None:
        told = ", ".join(f"{100 * one:+.0f}" for one in reached)
        return f"{len(reached)} of {n_seeds} seeds reach it: {told} %" if reached else "not reached"
    spread = "" if gain["half_width"] is None else f" ± {100 * gain['half_width']:.0f}"
    return f"{'≥ ' if gain['at_least'] else ''}{100 * gain['mean']:+.0f}{spread} %"


PAYS = {True: "pays", False: "does not pay", None: "not decided"}
HARD = (True, None, False)  # verdicts, the hardest last


def pays(summary: dict) -> str:
    """What a critic looks for: at which budgets the best grown model beats every smaller one that never grew."""
    said = []
    for budget, one in zip(summary["budgets"], summary["verdicts"], strict=True):
        if one is not None:
            grown, base = (summary["arms"][one[name]]["label"] for name in ("grown", "base"))
            said.append(f"{PAYS[one['pays']]} at {budget:.3g} FLOPs ({grown}: {plus_minus(one)} nats against {base})")
    if not said:
        return "No base that never grew stands beside a grown model of the same FLOPs here: whether growth pays is not known."
    least = summary["pays_from"]
    end = (
        f"It pays from {least:.3g} FLOPs on, as far as was run." if least else "From which budget on it pays is not seen here."
    )
    return f"Growth {'; '.join(said)}. {end}"


def rows(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a study's table; the last row says at which budgets growth pays."""
    shown = [i for i, loss in enumerate(summary["arms"]["scratch"]["losses"]) if loss]  # beside scratch; pictures show all
    budgets = [summary["budgets"][i] for i in shown]
    head = ["arm", "lr by budget", *(f"loss at {b:.3g}" for b in budgets), "speedup", "exact count", "minus base"]
    found = []
    for name, arm in summary["arms"].items():
        losses = ["-" if one is None else f"{one['mean']:.3f}" for one in (arm["losses"][i] for i in shown)]
        minus = arm["minus_base"][-1]
        gains = [percent(arm, count, len(summary["seeds"])) for count in ("flops", "flops_exact")]
        less = "" if minus is None or name == summary["bases"][-1] else plus_minus(minus)
        rates = ", ".join("-" if arm["lrs"][i] is None else f"{arm['lrs'][i]:g}" for i in shown)
        found.append([arm["label"], rates, *losses, *gains, less])
    verdicts = [
        "-" if one is None else f"{PAYS[one['pays']]}: {plus_minus(one)}" for one in map(summary["verdicts"].__getitem__, shown)
    ]
    found.append(["the best grown minus the base hardest to beat", "", *verdicts, "", "", ""])
    return head, found


def by_budget(results: dict, summary: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table with a line for each budget at which the target was trained from scratch, and each grown arm
    that was measured there: its speedup over scratch, by every count, and its loss minus that of each smaller model."""
    target = LlamaConfig(**results["model"])
    per_token, parameters, n_seeds = flops_per_token(target), n_params(target), len(summary["seeds"])
    flat = [name for name, arm in results["arms"].items() if not arm["grows"] and arm["n_layer"] < target.n_layer]
    head = ["FLOPs", "tokens per parameter", "grown", "speedup", "exact count", "in seconds"]
    head += [f"minus {summary['arms'][name]['label']}" for name in flat]
    found = []
    for i, budget in enumerate(summary["budgets"]):
        if summary["arms"]["scratch"]["losses"][i] is None:
            continue
        for name, arm in summary["arms"].items():
            if not arm["grows"] or arm["losses"][i] is None:
                continue
            counts = ("flops", "flops_exact", "seconds")
            gains = [gain_said(*over_gains(results, name, count, budget), n_seeds) for count in counts]
            minus = [difference(results, name, other, budget) for other in flat]
            tokens = f"{budget / per_token / parameters:.0f}"
            found.append([f"{budget:.3g}", tokens, arm["label"], *gains, *("-" if d is None else plus_minus(d) for d in minus)])
    return head, found


def difference(results: dict, arm: str, other: str, budget: float) -> dict | None:
    """The loss of an arm minus that of another at a budget, over the seeds; None unless both have one for every seed."""
    seeds = list(results["arms"]["scratch"]["seeds"])
    ends = [(ends_of(results, arm, seed), ends_of(results, other, seed)) for seed in seeds]
    if any(budget not in end for pair in ends for end in pair):
        return None
    return mean_and_interval([mine[budget][1]["val_loss"] - its[budget][1]["val_loss"] for mine, its in ends])


def plus_minus(one: dict) -> str:
    return f"{one['mean']:+.3f}" + ("" if one["half_width"] is None else f" ± {one['half_width']:.3f}")


def table(summary: dict) -> Table:
    shown = Table(title=f"{summary['question']} ({summary['size']}, {len(summary['seeds'])} seeds)")
    head, found = rows(summary)
    for name in head:
        shown.add_column(name, justify="left" if name == "arm" else "right")
    for row in found:
        shown.add_row(*row)
    return shown


def markdown(head: list[str], body: list[list[str]]) -> str:
    """A table whose first column says what a row is of; the others hold numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
