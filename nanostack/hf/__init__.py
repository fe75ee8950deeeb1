"""Hugging Face's folders of Llama, Mistral, Qwen2 and Qwen3: read (weights), written (export), their config.json (config)."""

from nanostack.hf.weights import TOKENIZER_FILES, Weights, load, read_json, require_extra

__all__ = ["TOKENIZER_FILES", "Weights", "load", "read_json", "require_extra"]
