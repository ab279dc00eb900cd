"""Brings a cluster's topics to their descriptions. Never deletes, never shrinks; again is harmless."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # public, but not in its __all__
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from meterline.contracts.topic_plan import Action, LiveTopic, Step, plan_growth, plan_topics
from meterline.contracts.topics import TopicSpec
from meterline.errors import RetryLater, UserError
from meterline.settings import KafkaSettings

__all__ = ["TopicAdmin"]

ANSWER_S_MAX = 5.0
"""A person waits at most this long to hear that Kafka is away."""
CHANGE_S_MAX = 30.0
"""A change that a busy controller has not made by now is reported as not made."""
SETTLE_S_MAX = 10.0
"""Brokers learn of a change one after the other; so long we wait until the one we ask has learnt it."""
SETTLE_POLL_S = 0.1

_LOGIN_ERRORS = {
    KafkaError._AUTHENTICATION,  # noqa: SLF001 - librdkafka's local codes begin with an underscore
    KafkaError._SSL,  # noqa: SLF001 - as above
    KafkaError.SASL_AUTHENTICATION_FAILED,
}
_TRY_AGAIN = {
    KafkaError.REQUEST_TIMED_OUT,
    KafkaError.NOT_CONTROLLER,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.THROTTLING_QUOTA_EXCEEDED,
}


class TopicAdmin:
    """The topics of one cluster. Keeps its client: librdkafka drops the answers of a client that is gone."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._address = kafka.bootstrap_servers
        self._errors: list[KafkaError] = []
        config: dict[str, Any] = {
            **kafka.client_config(),
            "error_cb": self._errors.append,
            # Its own log lines would drown ours: what matters of them arrives at error_cb.
            "log_level": 0,
        }
        self._client = AdminClient(config)

    def describe(self, names: Iterable[str]) -> dict[str, LiveTopic]:
        """Those of the topics that exist.

        Raises:
            RetryLater: Kafka doesn't answer.
            UserError: it refuses us.
        """
        try:
            known = self._client.list_topics(timeout=ANSWER_S_MAX).topics
        except KafkaException as error:
            raise self._explain(error) from error
        found = [name for name in names if name in known and known[name].error is None]
        if not found:
            return {}
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in found]
        answers = self._client.describe_configs(resources, request_timeout=ANSWER_S_MAX)
        configs = {resource.name: self._result(answer) for resource, answer in answers.items()}
        return {
            name: LiveTopic(
                name,
                len(known[name].partitions),
                min(len(partition.replicas) for partition in known[name].partitions.values()),
                {key: entry.value for key, entry in configs[name].items()},
            )
            for name in found
        }

    def apply(self, specs: Mapping[str, TopicSpec]) -> tuple[list[Step], list[Step]]:
        """Make all changes that can be made.

        Returns:
            The steps that were done, and those that are left to a person.

        Raises:
            RetryLater: Kafka doesn't answer; what is done is done, run it again.
            UserError: a topic can't be as described; nothing was changed.
        """
        steps = plan_topics(specs, self.describe(specs))
        if refused := [step for step in steps if step.action is Action.REFUSED]:
            lines = [f"  {s.topic} has {s.live} partitions, not {s.wanted}. {s.note}" for s in refused]
            raise UserError(
                "Nothing was changed, because these topics can't be brought to their description:\n"
                + "\n".join(lines)
                + "\nDescribe them as they are, or use another cluster."
            )
        done = [step for step in steps if step.action is not Action.DRIFT]
        for (topic, action), group in groupby(done, key=lambda step: (step.topic, step.action)):
            self._do(action, specs[topic], list(group))
        return done, self._settle(lambda: plan_topics(specs, self.describe(specs)))

    def grow(self, specs: Mapping[str, TopicSpec], name: str, partitions: int) -> list[Step]:
        """Give a topic so many partitions, and before it those that follow it. Settings stay as they are.

        Returns:
            What was done; nothing if all have that many.

        Raises:
            RetryLater: Kafka doesn't answer; what is done is done, run it again.
            UserError: this topic can't be grown so; nothing was changed.
        """
        steps = plan_growth(specs, self.describe(specs), name, partitions)
        for step in steps:
            self._do(step.action, specs[step.topic], [step])
        self._settle(lambda: plan_growth(specs, self.describe(specs), name, partitions))
        return steps

    def _do(self, action: Action, spec: TopicSpec, steps: Sequence[Step]) -> None:
        if action is Action.CREATE:
            topic = NewTopic(
                spec.name,
                num_partitions=int(steps[0].wanted),
                replication_factor=spec.replication_factor,
                config=dict(spec.config),
            )
            self._result(*self._client.create_topics([topic], request_timeout=CHANGE_S_MAX).values())
        elif action is Action.GROW:
            growth = NewPartitions(spec.name, int(steps[0].wanted))
            self._result(*self._client.create_partitions([growth], request_timeout=CHANGE_S_MAX).values())
        else:
            entries = [
                ConfigEntry(step.what, step.wanted, incremental_operation=AlterConfigOpType.SET)
                for step in steps
            ]
            resource = ConfigResource(ResourceType.TOPIC, spec.name, incremental_configs=entries)
            answers = self._client.incremental_alter_configs([resource], request_timeout=CHANGE_S_MAX)
            self._result(*answers.values())

    def _settle(self, plan: Callable[[], list[Step]]) -> list[Step]:
        deadline = time.monotonic() + SETTLE_S_MAX
        while True:
            left = plan()
            if all(step.action is Action.DRIFT for step in left) or time.monotonic() > deadline:
                return left
            time.sleep(SETTLE_POLL_S)

    def _result(self, answer: Future[Any]) -> Any:
        try:
            return answer.result()
        except KafkaException as error:
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return None  # somebody else applied the same descriptions at the same time
            raise self._explain(error) from error

    def _explain(self, error: KafkaException) -> RetryLater | UserError:
        self._client.poll(0)  # delivers what librdkafka knows of the connection
        cause: KafkaError = error.args[0]
        last = self._errors[-1] if self._errors else cause
        if any(problem.code() in _LOGIN_ERRORS for problem in (cause, *self._errors)):
            return UserError(
                f"Kafka at {self._address} refuses the login: {last.str()}. Check the METERLINE_KAFKA__* "
                "settings for security_protocol, sasl_* and ssl_ca_location."
            )
        if cause.code() < 0 or cause.retriable() or cause.code() in _TRY_AGAIN:
            return RetryLater(
                f"Kafka at {self._address} does not answer: {last.str()}. Start the local stack with "
                "`meterline up`, or set METERLINE_KAFKA__BOOTSTRAP_SERVERS to where Kafka is."
            )
        if cause.code() == KafkaError.INVALID_REPLICATION_FACTOR:
            return UserError(
                f"Kafka at {self._address} has too few brokers: {cause.str()} Leave out --recommended there."
            )
        return UserError(f"Kafka at {self._address} refuses: {cause.str()}")
