"""Learning prompts for matching: data, loss, loop and what is written. Needs torch, but for `settings` and `data`."""
