# SPDX-License-Identifier: Apache-2.0
"""Log lines: time, level, message, then key=value for what the caller gave in `extra`."""

from __future__ import annotations

import json
import logging
import sys

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """One line per record; values with spaces are quoted."""

    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the traceback after it where there is one."""
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        extra = {
            key: value
            for key, value in vars(record).items()
            if key not in _STANDARD and not key.startswith(("k8s_", "_"))
        }
        line = " ".join(f"{key}={_quoted(str(value))}" for key, value in (fields | extra).items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _quoted(value: str) -> str:
    plain = value and not any(c in ' "=\n' for c in value)
    return value if plain else json.dumps(value, ensure_ascii=False)


def configure(level: str) -> None:
    """Send everything to stderr; kopf and aiohttp only when something is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("kopf", "aiohttp.access", "kubernetes_asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
