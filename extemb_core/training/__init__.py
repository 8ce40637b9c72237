"""Train embedders: objectives (pure functions), data (tokenised once), trainer (on `transformers.Trainer`)."""
