"""Chat templates: prompts and answers as token ids, control tokens in text."""
