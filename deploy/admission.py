"""Who and what may pass the gateway: the requests that a SuperNode needs, signed with the key of a known site.

Nothing here reads a body or waits for anything: a request is judged by its head.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from datetime import datetime
from typing import final

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import verify_signature
from starlette.types import Scope

HEALTH = "/health"
"""Open to everybody: it says that a SuperLink is there and, by its date, what its clock says."""

ACTIVATE = "/v1/fleet/activate-node"
_CALLS = (
    *("deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run", "get-fab"),
    *("push-object", "pull-object", "confirm-message-received"),
)
ALLOWED: Mapping[bytes, tuple[str, str]] = {
    path.encode(): (method, path)
    for method, path in (("GET", HEALTH), ("POST", ACTIVATE), *(("POST", f"/v1/fleet/{call}") for call in _CALLS))
}
"""Method and path of all that is passed on, by the target as it stands in a request: nothing is decoded."""

MAX_BODY = 64 * 2**20
"""Bytes of one request. Flower cuts tensors into chunks of 5 MiB; its lists of a message's chunks are the longest."""

MAX_HEAD = 16 * 2**10
"""Bytes of a request's headers."""


@final
class NotPassedError(Exception):
    """A request is not passed on.

    Args:
        status: Of the answer. A SuperNode tries again after 502, 503 and 504 only, and ends itself after 401.
        why: For the log, and for whoever asked.
        code: Flower's own number of the error; 0: it has none.
    """

    def __init__(self, status: int, why: str, code: int = 0) -> None:
        super().__init__(why)
        self.status = status
        self.why = why
        self.code = code


def checked(scope: Scope) -> tuple[str, str, dict[str, str]]:
    """Return method, path and headers of a request that is among those that are passed on.

    Raises:
        NotPassedError: It is not.
    """
    method, path = ALLOWED.get(scope["raw_path"], ("", ""))
    if scope["method"] != method or scope["query_string"]:
        raise NotPassedError(404, "not among what a SuperNode needs")
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD:
        raise NotPassedError(431, f"headers of more than {MAX_HEAD} bytes")
    if len(headers) < len(scope["headers"]):
        raise NotPassedError(400, "a header is given twice")
    length = headers.get("content-length", "0" if method == "GET" else "")
    if "transfer-encoding" in headers or not length.isdecimal():
        raise NotPassedError(411, "the length of the body is not given")
    limit = MAX_BODY if method == "POST" else 0
    if int(length) > limit:
        raise NotPassedError(413, f"a body of {int(length)} bytes: more than {limit}")
    return method, path, headers


def site_of(keys: Mapping[bytes, tuple[str, ec.EllipticCurvePublicKey]], path: str, headers: Mapping[str, str]) -> str:
    """Return the site whose signature a request has.

    Raises:
        NotPassedError: It has none that is known, or the site's clock is wrong.
    """
    try:
        name, key = keys[b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER])]
    except (KeyError, ValueError):
        why = "not signed with the key of a site in the coordinator's file"
        if path == ACTIVATE:  # as the SuperLink answers: the SuperNode then prints why it ends
            raise NotPassedError(412, why, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED) from None
        raise NotPassedError(401, why) from None
    try:
        stamp = headers[TIMESTAMP_HEADER]
        age = (now() - datetime.fromisoformat(stamp)).total_seconds()
        valid = verify_signature(key, stamp.encode("ascii"), b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER]))
    except (KeyError, ValueError, TypeError):  # TypeError: a time without a zone
        valid, age = False, 0.0
    if not valid:
        raise NotPassedError(401, f"the signature is not site {name}'s")
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        side = "behind" if age > 0 else "ahead"
        raise NotPassedError(401, f"the clock of site {name} is {abs(age):.0f} s {side} of the coordinator's")
    return name
