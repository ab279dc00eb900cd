"""The schema registry's HTTP interface, the three calls that are needed.

Confluent's REST interface, which Karapace and Apicurio speak too. confluent-kafka's own client would bring
four more packages.
"""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from meterline.contracts.topics import load_topics
from meterline.contracts.versions import SchemaVersion
from meterline.errors import RetryLater, UserError

__all__ = ["SchemaRegistry", "subject_of"]

TIMEOUT_S = 2.0
"""A call may happen while a chunk is decoded, once per schema id; it must not stall the worker's loop."""

_CONTENT_TYPE = "application/vnd.schemaregistry.v1+json"


class SchemaRegistry:
    """One registry. The URL may carry a user and a password."""

    def __init__(self, url: str) -> None:
        """Take the address apart.

        Raises:
            UserError: the address is no http(s) URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"The schema registry's address {url!r} is no http(s) URL. Set METERLINE_KAFKA__REGISTRY_URL."
            )
        host = parts.netloc.rpartition("@")[2]
        self._base = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self._headers = {"Accept": _CONTENT_TYPE, "Content-Type": _CONTENT_TYPE}
        if parts.username:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = "Basic " + base64.b64encode(login).decode()

    def schema_of(self, schema_id: int) -> Any | None:
        """The schema with this id; None if the registry has none.

        Raises:
            RetryLater: the registry is away.
        """
        answer = self._call(f"/schemas/ids/{schema_id}")
        if answer is None or answer.get("schemaType", "AVRO") != "AVRO":
            return None
        return json.loads(answer["schema"])

    def id_of(self, version: SchemaVersion) -> int:
        """The id of one of our versions.

        Raises:
            RetryLater: the registry is away.
            UserError: the version isn't registered.
        """
        subject = subject_of(version)
        answer = self._call(f"/subjects/{quote(subject)}", {"schema": json.dumps(version.source)})
        if answer is None:
            raise UserError(
                f"The schema registry doesn't know version {version.number} of {version.name} under the "
                f"subject {subject}. Run `meterline schemas register`."
            )
        return int(answer["id"])

    def register(self, version: SchemaVersion) -> int:
        """Register one of our versions, again if need be; its id.

        Raises:
            RetryLater: the registry is away.
            UserError: the registry refuses the schema.
        """
        path = f"/subjects/{quote(subject_of(version))}/versions"
        answer = self._call(path, {"schema": json.dumps(version.source)})
        if answer is None:
            raise UserError(f"{self._base} has no {path}: is this a schema registry?")
        return int(answer["id"])

    def _call(self, path: str, body: dict[str, str] | None = None) -> dict[str, Any] | None:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._base + path, data, self._headers)  # noqa: S310 - only http and https get here
        try:
            with urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310 - as above
                answer: dict[str, Any] = json.load(response)
                return answer
        except HTTPError as error:
            if error.code == 404:
                return None
            if error.code < 500 and error.code != 429:
                text = error.read().decode("utf-8", "replace")
                raise UserError(
                    f"The schema registry {self._base} refused {path}: {error.code} {text}"
                ) from None
            raise RetryLater(f"The schema registry {self._base} answered {error.code}.") from error
        except (URLError, OSError, ValueError) as error:
            raise RetryLater(f"The schema registry {self._base} did not answer: {error}.") from error


def subject_of(version: SchemaVersion) -> str:
    """The registry subject: `<topic>-value`, and `<topic>-<record>` where a topic carries several records."""
    for topic in load_topics().values():
        if version.name in topic.schemas:
            record = f"{version.source['namespace']}.{version.source['name']}"
            return f"{topic.name}-value" if len(topic.schemas) == 1 else f"{topic.name}-{record}"
    raise UserError(f"No topic carries the schema {version.name!r}.")
