"""lm-eval's tasks: which are asked for, among them the paper's; how they are loaded, run, and what comes of them.

Needs the extra `eval` when tasks are asked for, and nothing of it before.
"""

import contextlib
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

from nanostack.errors import UserError
from nanostack.model import Llama


class PaperTask(NamedTuple):
    """One of the paper's tasks, and the paper's numbers: % of answers, or perplexity per word."""

    label: str
    folder: str  # among lm-eval's tasks
    metric: str
    scratch: float
    stack: float


# Figure 3 of arXiv 2405.15319: 1.1B from scratch and 6 layers stacked ×4, at 8e20 FLOPs each. It does not say which accuracy
# was taken. Its table 3 has ARC, PIQA and WinoGrande of TinyLlama as TinyLlama's EVAL.md has them, which is acc_norm.
PAPER = {
    "lambada_openai": PaperTask("LAMBADA", "lambada", "acc", 47.87, 48.20),
    "arc_challenge": PaperTask("ARC-c", "arc", "acc_norm", 27.21, 29.18),
    "arc_easy": PaperTask("ARC-e", "arc", "acc_norm", 48.86, 54.25),
    "logiqa": PaperTask("LogiQA", "logiqa", "acc_norm", 25.96, 28.87),
    "piqa": PaperTask("PIQA", "piqa", "acc_norm", 69.64, 71.98),
    "sciq": PaperTask("SciQ", "sciq", "acc_norm", 76.8, 81.1),
    "winogrande": PaperTask("WinoGrande", "winogrande", "acc", 54.53, 56.03),
    "wikitext": PaperTask("Wikitext", "wikitext", "word_perplexity", 17.98, 16.73),
}
SHARES = ("acc", "acc_norm")  # shown in %
OTHER_NAMES = {"sklearn": "scikit-learn", "yaml": "pyyaml", "pil": "pillow", "cv2": "opencv-python"}  # module: package


def task_names(given: str) -> list[str]:
    """The tasks asked for, each once."""
    names = [name.strip() for name in given.split(",") if name.strip()]
    return list(dict.fromkeys(one for name in names for one in (PAPER if name == "paper" else [name])))


def require_extra(data: Path | None) -> None:
    """Import lm-eval and what it needs. UserError with the line that installs what is missing."""
    if data:  # read when they are imported
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval forks to bootstrap, which hung: torch's threads do not survive a fork
    try:
        import datasets
        import lm_eval.evaluator  # noqa: F401

        import nanostack.commands.harness  # noqa: F401
    except ImportError as error:
        raise UserError(f"tasks need {error.name}: pip install 'nanostack[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def load_tasks(names: list[str], data: Path | None) -> list:
    """lm-eval's tasks and groups of these names, with their data. UserError for what is unknown or cannot be had."""
    import jinja2
    import lm_eval.tasks

    from nanostack.commands.harness import data_from

    where = None
    if all(name in PAPER for name in names):  # reading the other ten thousand files takes longer than a small evaluation
        root = Path(lm_eval.tasks.__file__).parent
        where = sorted({str(root / PAPER[name].folder) for name in names})
    manager = lm_eval.tasks.TaskManager(include_path=where, include_defaults=where is None)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, ["paper", *manager.all_tasks], 3)
            raise UserError(f"lm-eval has no task {name}" + (f". Perhaps you meant {', '.join(near)}" if near else ""))
    found = []
    with data_from(data):
        for name in names:
            try:
                loaded = manager.load([name])
            except (KeyError, jinja2.UndefinedError) as error:  # a split, or a column in a task's function or its template
                place = f" in {data}" if data else ""
                raise UserError(f"the data of {name}{place} lacks what the task reads: {error}") from error
            except UserError:
                raise
            except Exception as error:  # of the tasks' own code, which has many
                if isinstance(error, ImportError) or isinstance(error.__context__, ImportError):
                    raise UserError(f"the task {name} {needed(error)}") from error
                raise UserError(f"lm-eval could not load the task {name}: {' '.join(str(error).split())}") from error
            found += [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
            for task in loaded["tasks"].values():
                if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                    raise UserError(f"the task {name} runs code that the model wrote, or shows it pictures or sounds: not here")
    return found


def live_model(model: Llama, text, source: Path, batch: int, progress: Callable[[list, str], Iterable]):
    """The model that was read from `source` as lm-eval sees it, with a tokenizer of ours or of Hugging Face's."""
    from nanostack.commands.harness import HubTokenizer, LiveModel

    if not isinstance(text, HubTokenizer):
        text = HubTokenizer.of(text, model.config.seq_len, source if source.is_dir() else None)
    return LiveModel(model, text, batch, progress)


def needed(error: BaseException) -> str:
    """Which package is missing and how it is installed: in the task's own words, else as lm-eval or package indexes name it."""
    name = getattr(error, "name", None)
    if not name:  # the task has put it in a sentence
        return f"says: {' '.join(str(error).split())}"
    wanted = name.partition(".")[0].lower().replace("_", "-")
    for line in requires("lm_eval") or []:
        asked = line.partition(";")[0].strip()
        package = re.split(r"[\s\[<>=!~]", asked)[0].lower().replace("_", "-")
        if package == wanted or package.startswith(f"{wanted}-"):  # antlr4 is of antlr4-python3-runtime
            return f"needs {name}: pip install '{asked}'"
    return f"needs {name}: pip install {OTHER_NAMES.get(wanted, wanted)}"


def run_tasks(live, tasks: list, num_fewshot: int | None, limit: int | None) -> dict:
    """{"tasks": {name: version, n_shot, n (examples), metrics {name: {value, stderr}}}, "limit", "average_accuracy"}.

    The average is that of the paper: its seven accuracies, where all of them were measured, in %.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = {"num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": 1000, "log_samples": False}
    options["task_manager"] = TaskManager(include_defaults=False)  # the tasks are here; another index would take a minute
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answer
        try:
            found = simple_evaluate(live, tasks=tasks, **options)
        except ImportError as missing:
            raise UserError(f"the metric of a task {needed(missing)}") from missing
    answer = {}
    for name, values in found["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{chosen}")
            error = error if isinstance(error, float) else None  # "N/A" where lm-eval estimates none
            metrics[metric if chosen == "none" else key] = {"value": value, "stderr": error}
        answer[name] = {
            "version": found["versions"].get(name),
            "n_shot": found["n-shot"].get(name),
            "n": found["n-samples"].get(name, {}).get("effective"),
            "metrics": metrics,
        }
    shares = [name for name, task in PAPER.items() if task.metric in SHARES]
    average = None
    if all(name in answer for name in shares):
        average = sum(100 * answer[name]["metrics"][PAPER[name].metric]["value"] for name in shares) / len(shares)
    return {"tasks": answer, "limit": limit, "average_accuracy": average}
