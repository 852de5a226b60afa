"""`TypedFields`: look-ups in a parsed JSON object, each with an error that names the file and the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicpm.errors import ConfigError

_REQUIRED: Any = object()


@dataclass(frozen=True, slots=True)
class TypedFields:
    """Values under keys. A key that is absent or null has the default; without a default that is an error.

    Raises:
        ConfigError: from every method.
    """

    values: Mapping[str, Any]
    where: str

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ConfigError(f"{self.where}: {key} is missing")
            return default
        return value

    def _fail(self, key: str, wanted: str, value: Any) -> ConfigError:
        return ConfigError(f"{self.where}: {key} must be {wanted}, got {repr(value)[:60]}")

    def integer(self, key: str, default: int = _REQUIRED) -> int:
        """Return a whole number from 0 to 2^31 - 1."""
        value = self._get(key, default)
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self._fail(key, "a whole number", value)
        return value

    def number(self, key: str, default: float = _REQUIRED) -> float:
        """Return a number."""
        value = self._get(key, default)
        if type(value) not in (int, float) or abs(value) > 1e300:
            raise self._fail(key, "a number", value)
        return float(value)

    def truth(self, key: str, default: bool = _REQUIRED) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if type(value) is not bool:
            raise self._fail(key, "true or false", value)
        return value

    def section(self, key: str) -> Mapping[str, Any]:
        """Return an object, empty when the key is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._fail(key, "an object", value)
        return value

    def token_id(self, key: str, default: int | None) -> int | None:
        """Return a token id; null means that there is none, -1 (of some old files) too."""
        value = self.values.get(key, default)
        if value is None or value == -1:
            return None
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise self._fail(key, "a token id", value)
        return value

    def token_ids(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return one or several token ids as a tuple without repetitions."""
        value = self.values.get(key, list(default))
        items = value if isinstance(value, list) else [value]
        if any(item is not None and (type(item) is not int or not 0 <= item < 1 << 31) for item in items):
            raise self._fail(key, "a token id or a list of them", value)
        return tuple(dict.fromkeys(item for item in items if item is not None))
