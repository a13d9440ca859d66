"""MoH: a router chooses for each token which heads are computed; by learned gates, by query norms, or calibrated."""

from attn_plugins.methods.moh.calibrate import Calibration, calibrate
from attn_plugins.methods.moh.config import MoHConfig
from attn_plugins.methods.moh.gates import Routing
from attn_plugins.methods.moh.method import MoH
from attn_plugins.methods.moh.processor import MoHProcessor
from attn_plugins.methods.moh.weights import HeadRouter

__all__ = ["Calibration", "HeadRouter", "MoH", "MoHConfig", "MoHProcessor", "Routing", "calibrate"]
