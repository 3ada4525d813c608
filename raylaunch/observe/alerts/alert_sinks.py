"""Sends one alert to one sink, once: Slack's format, plain JSON, a command, mail. Always bounded in time.

    message → sent, or why not (`Result`)

The text of a result goes into events and logs. It contains only texts of raylaunch, status codes and errno messages: an
exception of a library, or a server's page, may contain the address. Redirects are not followed (a POST would become a
GET).
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylaunch import __version__
from raylaunch.config.schema import AlertsConfig
from raylaunch.observe.alerts.alert import clock
from raylaunch.scheduler.slurm import mail

HTTP_LIMIT, COMMAND_LIMIT = 10.0, 30.0
"""Seconds for one try in total."""
_LATER = {408, 425, 429}
"""Like 5xx, these may succeed later."""
_WORD = re.compile(r"[a-z][a-z_]{2,39}")
"""Slack's error codes, such as `no_service` or `channel_is_archived`; other responses are not repeated."""


@dataclass(frozen=True)
class Result:
    """`said`: why it was not accepted. `after`: seconds to wait, as the server requests. `refused`: a retry will hardly
    succeed. `detail`: output of the command, only for the user at the terminal."""

    ok: bool
    said: str = ""
    after: float = 0.0
    refused: bool = False
    detail: str = ""


async def send(sink: str, alerts: AlertsConfig, message: Mapping[str, Any]) -> Result:
    """Try to send it once."""
    limit = HTTP_LIMIT if sink in alerts.addresses else COMMAND_LIMIT
    try:
        if sink in alerts.addresses:
            import aiohttp  # noqa: F401  not within the timeout: slow storage is not the server's fault
        async with asyncio.timeout(limit):
            match sink:
                case "slack":
                    return await _post(alerts.addresses[sink].get_secret_value(), slack(message))
                case "webhook":
                    return await _post(alerts.addresses[sink].get_secret_value(), message)
                case "command":
                    return await _run(alerts.command, json.dumps(message).encode())
                case _:
                    return await _mail(str(alerts.mail), message)
    except TimeoutError:
        return Result(False, f"no response within {limit:g} s")
    except Exception as error:  # noqa: BLE001  whatever a library raises: its message may contain the address
        number = getattr(error, "errno", None)
        return Result(False, os.strerror(number) if isinstance(number, int) and number > 0 else type(error).__name__)


def plain(message: Mapping[str, Any]) -> str:
    """The complete text for people."""
    return f"{message['run']}: {message['text']}\n\n{_origin(message)}\n"


def slack(message: Mapping[str, Any]) -> dict[str, str]:
    """For Slack's incoming webhooks and compatible ones. `&`, `<` and `>` are escaped as Slack requires (mrkdwn): a
    traceback's `<module>` is not a link, and no text can mention a whole channel."""
    text, origin = (str(part).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for part in
                    (message["text"], _origin(message)))  # fmt: skip
    return {"text": f"*{message['run']}*: {text}\n_{origin}_"}


def _origin(message: Mapping[str, Any]) -> str:
    return f"{message['severity']}: {message['kind']}, cluster {message['cluster']}, {clock(message['time'])}"


async def _post(address: str, body: Mapping[str, Any]) -> Result:
    import aiohttp

    headers = {"User-Agent": f"raylaunch/{__version__}"}
    async with (
        aiohttp.ClientSession(trust_env=True, headers=headers) as session,  # HTTPS_PROXY: compute nodes may need it
        session.post(address, json=dict(body), allow_redirects=False) as answer,
    ):
        status = answer.status
        if 200 <= status < 300:
            return Result(True)
        said = f"HTTP {status}"
        word = _WORD.fullmatch((await answer.content.read(100)).decode(errors="replace").strip())
        if word and word[0] not in address:
            said += f" {word[0]}"
        elif status < 400:
            said += " (a redirect: configure its target instead)"
        later = status in _LATER or status >= 500
        return Result(False, said, _after(answer.headers.get("Retry-After", "")) if later else 0.0, refused=not later)


def _after(text: str) -> float:
    """Retry-After in seconds, from its two forms: seconds, or a date (RFC 9110, 10.2.3)."""
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


async def _mail(address: str, message: Mapping[str, Any]) -> Result:
    command = mail.mailer(address, mail.subject(message))
    if command is None:
        return Result(False, "this node has neither sendmail nor mail", refused=True)
    text = plain(message)
    return await _run(command, mail.letter(message, address, text) if "-t" in command else text.encode())


async def _run(command: Sequence[str], stdin: bytes) -> Result:
    """A command in its own session, without a shell; all its processes are killed at the timeout."""
    with tempfile.TemporaryFile() as errors:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return Result(False, f"cannot be started: {error.strerror}", refused=True)
        try:
            await process.communicate(stdin)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        code = process.returncode
        if code == 0:
            return Result(True)
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - 500))
        last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        how = f"exit code {code}" if code is not None and code > 0 else f"killed by signal {-(code or 0)}"
        return Result(False, how, refused=True, detail="".join(last))
