"""The base class of all settings, and the error with which they refuse a value."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["KeyInvalid", "Settings"]


class Settings(BaseModel):
    """Settings that cannot be changed and take no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class KeyInvalid(ValueError):
    """Raised by a validator of whole settings: the value of one key is impossible beside the others.

    Args:
        key: path of the key below the settings that raise it, such as `evaluate.sample_tokens`.
        problem: what is wrong with its value.
    """

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = key, problem
        super().__init__(f"{key}: {problem}")
