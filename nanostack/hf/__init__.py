"""Hugging Face's Llama folders: read (weights), written (export), their config.json (config)."""

from nanostack.hf.weights import TOKENIZER_FILES, Weights, load, read_json, require_extra

__all__ = ["TOKENIZER_FILES", "Weights", "load", "read_json", "require_extra"]
