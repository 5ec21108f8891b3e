"""One decision about one environment variable: what, why, from where, and what the user said instead.

The user's word stands: a variable that the user set is passed on as it is, and the difference to what we would have set is
kept to be shown. A decision with value None is a decision too: left unset, because the default is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

UserEnv = Mapping[str, str] | Sequence[Mapping[str, str]]
"""What the user has set: one environment for all nodes, or one for each, in their order."""


def of_each_node(user_env: UserEnv, num_nodes: int) -> list[Mapping[str, str]]:
    """The user's environment of each node."""
    if isinstance(user_env, Mapping):
        return [user_env] * num_nodes
    assert len(user_env) == num_nodes, f"{len(user_env)} environments for {num_nodes} nodes"
    return list(user_env)


@dataclass(frozen=True)
class Decision:
    variable: str
    value: str | None
    """What the rule says; None: leave it unset."""
    reason: str
    source: str
    """Where the rule comes from: a guide, a manifest, a contract."""
    user_value: str | None = None
    """What the user's environment already holds; it wins."""

    @property
    def effective(self) -> str | None:
        """What the rank will see."""
        return self.value if self.user_value is None else self.user_value

    @property
    def is_overruled(self) -> bool:
        """The user set something else than the rule would."""
        return self.user_value is not None and self.user_value != self.value

    @property
    def is_ours(self) -> bool:
        """We add this variable; the user did not set it."""
        return self.user_value is None and self.value is not None


def with_user(decision: Decision, user_env: Mapping[str, str]) -> Decision:
    """The decision with the user's own value beside it, if there is one."""
    found = user_env.get(decision.variable)
    return decision if found is None else replace(decision, user_value=found)


def variables(decisions: tuple[Decision, ...]) -> dict[str, str]:
    """The variables that we add; the user's own are theirs already."""
    return {
        decision.variable: decision.value for decision in decisions if decision.is_ours and decision.value is not None
    }
