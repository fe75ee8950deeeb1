"""Runs Python commands one after another, each in a process forked from this one, which has imported torch already.

To import torch and the rest takes seconds, and the tests run hundreds of commands. What runs is the real command in a process
of its own, as `python COMMAND` would. A request is a line of JSON: argv, cwd and the files for what it prints; the answer is
the exit code.
"""

import gc
import json
import os
import runpy
import sys
import warnings

import grow  # noqa: F401
import nanostack.commands.evaluate
import nanostack.commands.export
import nanostack.commands.fit
import nanostack.commands.import_hf
import nanostack.commands.plan
import nanostack.commands.prepare
import nanostack.commands.sample  # noqa: F401
import train  # noqa: F401

gc.freeze()  # a collection would copy every page
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

for number, path, flags in (0, os.devnull, os.O_RDONLY), (1, request["out"], os.O_WRONLY), (2, request["err"], os.O_WRONLY):
    os.dup2(os.open(path, flags), number)
os.chdir(request["cwd"])
warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
del sys.path[0]  # this folder
sys.argv = request["argv"]
if sys.argv[0] == "-m":
    del sys.argv[0]
    sys.path.insert(0, request["cwd"])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
