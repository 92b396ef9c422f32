"""Prompt embeddings: what conditions the UNet."""

from difftap.prompts.encode import encode_prompt

__all__ = ["encode_prompt"]
