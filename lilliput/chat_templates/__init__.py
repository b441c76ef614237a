"""Chat templates that can replace a model's own (`source.chat_template`)."""
