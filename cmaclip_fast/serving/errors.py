"""What a request is refused with."""

from __future__ import annotations

import math

from cmaclip_fast.errors import clipped, one_line

MESSAGE_LENGTH = 500


class Refused(Exception):
    """A request that is not answered as asked.

    Attributes:
        status: of HTTP.
        code: a name for programs, such as `unreadable_image`.
        message: one line for people: the cause and the remedy.
        row: the row that it is about, counted from 0.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self, status: int, code: str, message: str, row: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.row = status, code, row
        self.message = clipped(one_line(message), MESSAGE_LENGTH)
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def content(self) -> dict[str, dict[str, str | int | None]]:
        return {"error": {"code": self.code, "message": self.message, "row": self.row}}


def full(waiting: str, retry_after: float) -> Refused:
    return Refused(429, "busy", f"{waiting}: try again later", retry_after=retry_after)
