"""The models and trainers of others: transformers, Trainer, TRL, axolotl."""
