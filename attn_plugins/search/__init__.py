"""Choose under a budget: profile what every choice would cost, choose one for each item, see the trade-offs.

Nothing here knows models. `block_influence`, `window_influence` and `hidden_loss` profile causal spans (first-order,
exact, tiled);
`Problem`, `choose` and `pareto_set` take any numbers: losses and costs of each option for each item.
"""

from attn_plugins.search.choice import choose
from attn_plugins.search.influence import block_influence, window_influence
from attn_plugins.search.losses import grouped, hidden_loss
from attn_plugins.search.pareto import best_of, dominates, pareto_set
from attn_plugins.search.problem import Choice, Problem
from attn_plugins.search.rules import Rule, rule_grid

__all__ = [
    "Choice", "Problem", "Rule", "best_of", "block_influence", "choose", "dominates", "grouped", "hidden_loss",
    "pareto_set", "rule_grid", "window_influence",
]  # fmt: skip
