"""Integrations with other libraries: transformers models, Trainer, TRL, accelerate, axolotl."""
