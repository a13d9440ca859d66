"""Agent attention with weights of its own: a method for models that are loaded, and a layer to build models of."""

from attn_plugins.methods.trained_agent.module import AgentAttention
from attn_plugins.methods.trained_agent.weights import AgentWeights

__all__ = ["AgentAttention", "AgentWeights"]
