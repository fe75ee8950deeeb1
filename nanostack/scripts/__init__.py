"""train.py and grow.py, as an installation has them: `nanostack train` and `nanostack grow` run these links to the scripts."""
