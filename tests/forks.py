"""Runs Python commands, each in a process forked from this one, which has imported torch already.

To import torch and the rest takes seconds, and the tests run hundreds of commands. What runs is the real command in a process
of its own, as `python COMMAND` would. A request is a line of JSON, and so is its answer:

    {"argv", "cwd", "env", "in", "out", "err"}   start a command with these files as its standard streams: its process id
    {"pid", "wait"}                              its exit code; null where it still runs and is not to be waited for
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import types
import warnings

from nanostack.__main__ import COMMANDS

for module in (
    "train",
    "grow",
    "study.__main__",
    "torch._dynamo",
    *(f"nanostack.commands.{module}" for module, _ in COMMANDS.values()),
):
    importlib.import_module(module)


def answer(request: dict) -> int | None:
    pid, status = os.waitpid(request["pid"], 0 if request["wait"] else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


gc.freeze()  # a collection would copy every page
for line in sys.stdin:
    request = json.loads(line)
    if "argv" in request and (child := os.fork()) == 0:
        break
    print(json.dumps(child if "argv" in request else answer(request)), flush=True)
else:
    sys.exit()

streams = (request["in"], os.O_RDONLY), *((request[name], os.O_WRONLY | os.O_APPEND) for name in ("out", "err"))
for number, (path, flags) in enumerate(streams):
    os.dup2(os.open(path, flags), number)
os.chdir(request["cwd"])
os.environ |= request["env"]
signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests that run in the background have ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has
warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
sys.path[:1] = os.environ.get("PYTHONPATH", "").split(os.pathsep)  # instead of this folder
sys.argv = request["argv"]
if sys.argv[0] in ("-m", "-c"):
    kind, what = sys.argv[:2]
    sys.path.insert(0, request["cwd"])
    if kind == "-m":
        del sys.argv[0]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        del sys.argv[1]
        sys.modules["__main__"] = main = types.ModuleType("__main__")  # which processes that this one spawns would import
        exec(compile(what, "<string>", "exec"), main.__dict__)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
