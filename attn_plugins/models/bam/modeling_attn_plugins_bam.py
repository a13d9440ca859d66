"""A mixture of experts made by BAM (arXiv 2408.08274). Its code is the package attn_plugins: pip install attn-plugins.

This file is copied beside every saved mixture: `from_pretrained(..., trust_remote_code=True)` reads it where nothing
has imported attn_plugins; after `import attn_plugins` it is not needed.
"""

import attn_plugins.models.bam


def __getattr__(name: str) -> object:
    return attn_plugins.models.bam.named_class(name)
