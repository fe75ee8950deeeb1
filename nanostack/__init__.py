"""nanostack: pre-train Llama models by stacking them while they train."""

from nanostack import names

names.install()
