"""Prompts: the text or learned prompt that conditions a branch for an image, and its embedding."""

from difftap.prompts.book import PromptBook
from difftap.prompts.choose import (
    SLOT,
    Prompt,
    Subject,
    choose_prompt,
    choose_prompts,
    embed,
    fill,
    made_of_images,
    wants_category,
)
from difftap.prompts.encode import encode_prompt

__all__ = [
    "SLOT",
    "Prompt",
    "PromptBook",
    "Subject",
    "choose_prompt",
    "choose_prompts",
    "embed",
    "encode_prompt",
    "fill",
    "made_of_images",
    "wants_category",
]
