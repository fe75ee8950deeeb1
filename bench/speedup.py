"""How many FLOPs does growth save? What `python -m study` does (study/__main__.py), by the name that the docs use.

python bench/speedup.py study/studies/operators.py                       run a study, or go on with it
python bench/speedup.py out/1b_scratch out/1b_grown ...                  compare finished runs
python bench/speedup.py --report                                         write docs/study.md anew from the results
"""

from nanostack.errors import command_line
from study.__main__ import Command, main

if __name__ == "__main__":
    command_line(Command, main)
