"""Presets as data: `<method>/<model>.yaml`. The keys are described in attn_plugins/presets.py, which reads them."""
