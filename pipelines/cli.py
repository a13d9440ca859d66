"""The command line: `attn-plugins`. Every command is a thin call of something that Python can call as well."""

from attn_plugins.pipelines.commands import bench, compare, doctor, look, mip, moa, profile, simulate, tune, upcycle
from attn_plugins.pipelines.commands.app import app

# The order of the commands in --help.
for module in (look, doctor, simulate, compare, profile, tune, moa, mip, upcycle, bench):
    module.register(app)

__all__ = ["app"]

if __name__ == "__main__":
    app()
